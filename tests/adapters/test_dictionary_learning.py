"""The dictionary_learning codec without the library: every class and age of file, half precision, hostile pickles, and what cannot be said."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch

from saehub.checkpoint import format as v1
from saehub.checkpoint.load import find_format, load
from saehub.checkpoint.sae import SAE
from saehub.errors import CheckFailed, FormatError
from saehub_dictionary_learning.codec import DictionaryLearningFormat

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:.*decoder rows have lengths")]
D, F, K = 16, 48, 6
ANY = DictionaryLearningFormat()
SAYABLE = [  # architecture, config, class, whether something is folded
    ("relu", {}, "AutoEncoder", False), ("relu", {"subtract_b_dec": False}, "AutoEncoderNew", False), ("topk", {}, "AutoEncoderTopK", False),
    ("batchtopk", {}, "BatchTopKSAE", False), ("matryoshka", {}, "MatryoshkaBatchTopKSAE", False),
    ("jumprelu", {"subtract_b_dec": False}, "JumpReluAutoEncoder", False), ("gated", {}, "GatedAutoEncoder", False),
    ("topk", {"subtract_b_dec": False}, "AutoEncoderTopK", True), ("jumprelu", {}, "JumpReluAutoEncoder", True),
    ("gated", {"subtract_b_dec": False}, "GatedAutoEncoder", True), ("relu", {"decoder_norm_scaling": True}, "AutoEncoder", True),
    ("batchtopk", {"subtract_b_dec": False}, "JumpReluAutoEncoder", True), ("matryoshka", {"subtract_b_dec": False}, "JumpReluAutoEncoder", True),
    ("batchtopk", {"params": {}}, "JumpReluAutoEncoder", True), ("jumprelu", {"decoder_norm_scaling": True, "subtract_b_dec": False}, "JumpReluAutoEncoder", True),
    ("matryoshka", {"decoder_norm_scaling": True}, "MatryoshkaBatchTopKSAE", True),
]  # fmt: skip
TRANSCODER = {"kind": "transcoder", "subtract_b_dec": False}
UNSAYABLE = [
    ("abstopk", {}, "no class for abstopk"), ("groupmax", {}, "no class for groupmax"), ("matching_pursuit", {}, "no class for matching_pursuit"),
    ("relu", TRANSCODER, "autoencoders only"), ("topk", {**TRANSCODER, "d_out": 9}, "autoencoders only"), ("relu", {"kind": "skip_transcoder", "subtract_b_dec": False}, "autoencoders only"),
    ("topk", {"norm_in": "layer_norm", "norm_out": "layer_norm"}, "layer_norm"),
]  # fmt: skip
PROVENANCE = {
    "site": "mlp_out.2",
    "model": {"name": "org/model", "revision": "abc"},
    "tokens": {"context": 128},
    "origin": {"format": "elsewhere", "config": {"π": [1, 2.5, None]}},
}


# ---------------------------------------------------------------------- folders as the library writes them
def normal(seed: int, *shape: int) -> torch.Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SCALARS = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(1.25)}
LINEAR = {"encoder.weight": normal(0, F, D), "encoder.bias": normal(1, F), "decoder.weight": normal(2, D, F)}
PLAIN = {
    "W_enc": normal(3, F, D).T,
    "b_enc": normal(4, F),
    "W_dec": normal(5, F, D),
    "b_dec": normal(6, D),
}  # W_enc with its strides, as trained
STATES = {
    "AutoEncoder": {"bias": normal(7, D), **LINEAR},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": normal(7, D)},
    "AutoEncoderTopK": {"b_dec": normal(7, D), **SCALARS, **LINEAR},
    "BatchTopKSAE": {"b_dec": normal(7, D), **SCALARS, **LINEAR},
    "MatryoshkaBatchTopKSAE": {**PLAIN, **SCALARS, "group_sizes": torch.tensor([12, 36])},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": normal(8, F).abs()},
    "GatedAutoEncoder": {"decoder_bias": normal(7, D), "r_mag": normal(9, F), "gate_bias": normal(10, F), "mag_bias": normal(11, F), "encoder.weight": normal(0, F, D), "decoder.weight": normal(2, D, F)},
    "IdentityDict": {},
}  # fmt: skip


def config_of(dict_class: str, **words) -> dict:
    trainer = {
        "trainer_class": "Any",
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": F,
        "lr": 1e-3,
        "layer": 8,
        "lm_name": "org/model",
        **words,
    }
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        trainer.setdefault("k", K)
    return {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}


def written(folder, config: dict, state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    torch.save(state, folder / "ae.pt")
    return folder


def stored(folder) -> dict:
    return torch.load(folder / "ae.pt", weights_only=True)


def equation(dict_class: str, state: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction in float64, from the library's source in words: written here a second time, without saehub."""
    t = {name: tensor.double() for name, tensor in state.items()}
    x = x.double()
    W_enc = t["encoder.weight"].T if "encoder.weight" in t else t["W_enc"]
    W_dec = t["decoder.weight"].T if "decoder.weight" in t else t["W_dec"]
    b_dec = next(t[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in t)
    p = (x if dict_class in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec) @ W_enc
    if dict_class == "GatedAutoEncoder":
        f = (p + t["gate_bias"] > 0) * (t["r_mag"].exp() * p + t["mag_bias"]).clamp(min=0)
    else:
        p = (p + t.get("encoder.bias", t.get("b_enc"))).clamp(min=0)
        if dict_class == "AutoEncoderTopK":
            p = p * torch.zeros_like(p).scatter(1, p.topk(K, dim=1).indices, 1.0)
        f = p * (p > t["threshold"]) if dict_class in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder") else p
    return f, f @ W_dec + b_dec


def same(a: SAE, b: SAE) -> bool:
    ours, others = a.tensors(), b.tensors()
    return (
        a.config == b.config
        and ours.keys() == others.keys()
        and all(ours[n].dtype == others[n].dtype and torch.equal(ours[n], others[n]) for n in ours)
    )


# ---------------------------------------------------------------------- there and back
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "config", "dict_class", "folds"), SAYABLE)
def test_there_and_back(toy, rows, tmp_path, architecture, config, dict_class, folds, dtype):
    """saehub -> dictionary_learning -> saehub: bits, config and provenance; where a flag has no word, the same function and a note."""
    params = config.get("params")
    sae = toy(architecture, dtype=dtype, provenance=PROVENANCE, **{key: value for key, value in config.items() if key != "params"})
    sae = SAE.build(sae.config.replace(params=params), sae.tensors(), sae.provenance) if params is not None else sae
    notes = ANY.write(sae, tmp_path)
    again = ANY.read(tmp_path)
    assert ANY.sniff(tmp_path) and again.provenance == PROVENANCE and bool(notes["folded"]) == folds
    assert all(torch.equal(again.tensors()[name], sae.tensors()[name]) for name in notes["bit_exact"])
    words = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (words["dict_class"], words["activation_dim"], words["dict_size"]) == (dict_class, D, F)
    assert words["layer"] == 2 and words["submodule_name"] == "mlp_out_layer_2" and words["lm_name"] == "org/model"
    if not folds:
        assert same(sae, again) and set(notes["bit_exact"]) == set(sae.tensors())
    f, f2 = sae.encode(rows, dtype=torch.float64), again.encode(rows, dtype=torch.float64)
    y, y2 = sae(rows, dtype=torch.float64), again(rows, dtype=torch.float64)
    equal = ((f != 0) == (f2 != 0)).all(1)
    assert (
        equal.double().mean() > 0.98 and torch.allclose(f[equal], f2[equal], atol=1e-5) and torch.allclose(y[equal], y2[equal], atol=1e-5)
    )
    expected = equation(dict_class, stored(tmp_path), rows)
    # a threshold for all latents and one for each are the same function, so both readings must give it
    assert (
        torch.equal(f2 != 0, expected[0] != 0)
        and torch.allclose(f2, expected[0], rtol=1e-12, atol=1e-12)
        and torch.allclose(y2, expected[1], rtol=1e-12, atol=1e-12)
    )


@pytest.mark.parametrize(("architecture", "config", "words"), UNSAYABLE)
def test_what_cannot_be_said_is_refused(toy, tmp_path, architecture, config, words):
    sae = toy(architecture, **config)
    assert words in ANY.refusal(sae)
    with pytest.raises(CheckFailed, match=words):
        ANY.write(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists() and ANY.refusal(toy("topk")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dict_class", STATES)
def test_a_foreign_folder_computes_what_it_says_and_comes_back_as_it_was(rows, tmp_path, dict_class, dtype):
    """dictionary_learning -> saehub (on disk) -> dictionary_learning: every tensor's bits, every key of config.json; the equation in between."""
    state = {n: t.to(dtype) if t.is_floating_point() and n != "threshold" else t for n, t in STATES[dict_class].items()}
    config = config_of(dict_class, odd={"a": [1, None]})
    sae = ANY.read(written(tmp_path / "theirs", config, state))
    f, y = sae.encode(rows, dtype=torch.float64), sae(rows, dtype=torch.float64)
    expected = (rows.double(), rows.double()) if dict_class == "IdentityDict" else equation(dict_class, state, rows)
    assert (
        torch.equal(f != 0, expected[0] != 0)
        and torch.allclose(f, expected[0], rtol=1e-12, atol=1e-12)
        and torch.allclose(y, expected[1], rtol=1e-12, atol=1e-12)
    )
    notes = ANY.write(v1.load(v1.save(sae, tmp_path / "ours")), tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    back = stored(tmp_path / "back")
    assert back.keys() == state.keys() and all(back[n].dtype == state[n].dtype and torch.equal(back[n], state[n]) for n in state)
    assert set(notes["bit_exact"]) == set(sae.tensors()) and not notes["folded"] and not notes["dropped"]


def test_identity_is_exact_in_float32(rows, tmp_path, toy):
    sae = ANY.read(written(tmp_path, config_of("IdentityDict"), {}))
    assert torch.equal(sae.encode(rows), rows) and torch.equal(sae(rows), rows)
    half = SAE.build(
        sae.config, {n: t.bfloat16() for n, t in sae.tensors().items()}, PROVENANCE
    )  # from elsewhere: written as the same class
    ANY.write(half, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["trainer"]["dict_class"] == "IdentityDict" and same(
        ANY.read(tmp_path / "half"), half
    )


# ---------------------------------------------------------------------- ages of files
def test_a_topk_file_from_before_there_were_buffers(rows, tmp_path):
    """No k and no threshold among the tensors: k is the config's, and the file comes back without them."""
    state = {n: t for n, t in STATES["AutoEncoderTopK"].items() if n not in ("k", "threshold")}
    sae = ANY.read(written(tmp_path / "old", config_of("AutoEncoderTopK"), state))
    assert sae.config.params["k"] == K and torch.equal(
        sae.encode(rows), ANY.read(written(tmp_path / "new", config_of("AutoEncoderTopK"), STATES["AutoEncoderTopK"])).encode(rows)
    )
    ANY.write(v1.load(v1.save(sae, tmp_path / "ours")), tmp_path / "back")
    assert stored(tmp_path / "back").keys() == state.keys()


def test_a_batchtopk_file_without_a_threshold_is_refused(tmp_path):
    for dict_class in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        state = {n: t for n, t in STATES[dict_class].items() if n != "threshold"}
        with pytest.raises(FormatError, match="no threshold") as error:
            ANY.read(written(tmp_path / dict_class, config_of(dict_class), state))
        assert "depends on its neighbours" in error.value.why


def test_a_threshold_of_minus_one_is_a_relu(rows, tmp_path):
    """What the library stores before `threshold_start_step`."""
    state = STATES["BatchTopKSAE"] | {"threshold": torch.tensor(-1.0)}
    sae = ANY.read(written(tmp_path, config_of("BatchTopKSAE"), state))
    assert torch.allclose(sae.encode(rows, dtype=torch.float64), equation("AutoEncoder", {"bias": state["b_dec"], **LINEAR}, rows)[0])


def test_a_backup_of_the_git_version_is_put_into_raw_units(rows, tmp_path):
    """{step, ae, optimizer, config, norm_factor} under the same name: trained on x / norm_factor, biases not yet multiplied by it."""
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    for dict_class in ("BatchTopKSAE", "AutoEncoderTopK", "JumpReluAutoEncoder"):
        backup = {"step": 500, "ae": STATES[dict_class], "optimizer": adam, "config": config_of(dict_class)["trainer"], "norm_factor": 12.5}
        folder = written(tmp_path / dict_class, config_of(dict_class), backup)
        with pytest.warns(UserWarning, match="step 500"), pytest.warns(UserWarning, match="rows divided by 12.5"):
            sae = ANY.read(folder)
        f, y = equation(dict_class, STATES[dict_class], rows / 12.5)
        assert torch.allclose(sae.encode(rows, dtype=torch.float64), 12.5 * f, atol=1e-5) and torch.allclose(
            sae(rows, dtype=torch.float64), 12.5 * y, atol=1e-5
        )
        assert ANY.folds(folder) == ["norm_factor 12.5 into biases and thresholds"]
        assert sae.provenance["origin"]["backup"] == {"step": 500, "norm_factor": 12.5}
        ANY.write(sae, tmp_path / f"{dict_class} back")
        assert ANY.folds(tmp_path / f"{dict_class} back") == []
        assert stored(tmp_path / f"{dict_class} back").keys() == STATES[dict_class].keys() and same(
            ANY.read(tmp_path / f"{dict_class} back"), sae
        )
        (folder / "config.json").unlink()  # the backup carries its trainer's config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(ANY.read(folder), sae)
    whole = {"step": 5, "ae": STATES["AutoEncoder"], "optimizer": adam, "config": {}, "norm_factor": None}
    with pytest.warns(UserWarning, match="step 5"):
        sae = ANY.read(written(tmp_path / "none", config_of("AutoEncoder"), whole))
    assert torch.equal(sae.b_dec, STATES["AutoEncoder"]["bias"])


def test_a_checkpoint_in_the_middle_of_a_run(rows, tmp_path):
    """`checkpoints/ae_<step>.pt` belongs to the config.json above it."""
    folder = written(tmp_path / "trainer_0", config_of("AutoEncoder"), STATES["AutoEncoder"])
    (folder / "checkpoints").mkdir()
    torch.save(STATES["AutoEncoder"] | {"bias": torch.ones(D)}, folder / "checkpoints/ae_500.pt")
    assert find_format(folder / "checkpoints/ae_500.pt") == "dictionary_learning/dictionary_learning"
    assert torch.equal(load(folder / "checkpoints/ae_500.pt").b_dec, torch.ones(D)) and torch.equal(
        load(folder).b_dec, STATES["AutoEncoder"]["bias"]
    )
    for name in ("trainer_1", "deep/trainer_2"):
        written(tmp_path / name, config_of("AutoEncoder"), STATES["AutoEncoder"])
    with pytest.raises(FormatError) as error:
        ANY.read(tmp_path)
    assert error.value.fix.endswith("deep/trainer_2, trainer_0, trainer_1")


def test_decoders_that_are_not_normalised_come_with_a_caution(tmp_path):
    """April-update dictionaries: stored as trained; the library's own loader multiplies their features by the norms."""
    unit = STATES["AutoEncoder"] | {"decoder.weight": torch.nn.functional.normalize(STATES["AutoEncoder"]["decoder.weight"], dim=0)}
    assert "cautions" not in ANY.read(written(tmp_path / "unit", config_of("AutoEncoder"), unit)).provenance
    with pytest.warns(UserWarning, match="decoder rows have lengths from"):
        sae = ANY.read(written(tmp_path / "april", config_of("AutoEncoder"), STATES["AutoEncoder"]))
    assert torch.equal(sae.W_dec, STATES["AutoEncoder"]["decoder.weight"].T) and not sae.config.decoder_norm_scaling


# ---------------------------------------------------------------------- sites
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"submodule_name": "resid_post_layer_8"}, {"site": "resid_post.8"}),
        ({"submodule_name": "mlp_out_layer_8", "layer": "8"}, {"site": "mlp_out.8"}),
        (
            {"submodule_name": "resid_post_layer_8", "layer": 7},
            {"unknown_site": "resid_post_layer_8 (layer 7)"},
        ),  # they contradict each other
        ({"submodule_name": None}, {"unknown_site": "layer 8"}),
        ({}, {"unknown_site": "layer 8"}),
        ({"submodule_name": "mlp"}, {"unknown_site": "mlp"}),
        ({"submodule_name": "model.layers.8.mlp", "lm_name": "builtin/tiny-llama"}, {"site": "mlp_out.8"}),
        ({"submodule_name": "model.layers.8.mlp:in"}, {"site": "model.layers.8.mlp:in"}),
        ({"submodule_name": "something", "lm_name": "builtin/tiny-llama"}, {"unknown_site": "something"}),
        ({"layer": None}, {}),
    ],
)
def test_submodule_names_become_sites_or_stay_as_they_are(tmp_path, words, expected):
    provenance = ANY.read(written(tmp_path / "a", config_of("AutoEncoder", **words), STATES["AutoEncoder"])).provenance
    assert {key: value for key, value in provenance.items() if "site" in key} == expected
    assert provenance["model"]["name"] == words.get("lm_name", "org/model") and provenance["tokens"] == {"context": 128}
    stranger = SAE.build(
        ANY.read(tmp_path / "a").config, ANY.read(tmp_path / "a").tensors(), {k: v for k, v in provenance.items() if k != "origin"}
    )
    ANY.write(stranger, tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    del config["saehub"]
    assert {k: v for k, v in ANY.read(written(tmp_path / "c", config, STATES["AutoEncoder"])).provenance.items() if "site" in k} == expected


# ---------------------------------------------------------------------- what changed since
def test_a_changed_sae_does_not_get_its_old_config(rows, tmp_path):
    sae = ANY.read(written(tmp_path / "theirs", config_of("AutoEncoderTopK"), STATES["AutoEncoderTopK"]))
    fewer = SAE.build(sae.config.replace(params={"k": 3}), sae.tensors(), sae.provenance)
    ANY.write(fewer, tmp_path / "fewer")
    assert json.loads((tmp_path / "fewer/config.json").read_text())["trainer"]["k"] == int(stored(tmp_path / "fewer")["k"]) == 3
    assert same(ANY.read(tmp_path / "fewer"), fewer)
    ANY.write(sae.scale_input(0.5), tmp_path / "scaled")  # other units: the threshold that was tracked beside it is in the old ones
    assert float(stored(tmp_path / "scaled")["threshold"]) == -1 and float(STATES["AutoEncoderTopK"]["threshold"]) == 1.25


def test_the_side_channel_never_overrules_the_folder(toy, tmp_path):
    """Edited after saehub wrote it: tensors and sizes count as they stand."""
    ANY.write(toy("matryoshka", subtract_b_dec=False, provenance=PROVENANCE), tmp_path / "a")
    assert ANY.read(tmp_path / "a").config.architecture == "matryoshka"
    state = stored(tmp_path / "a")
    state["threshold"][7] += 1
    torch.save(state, tmp_path / "a/ae.pt")
    sae = ANY.read(tmp_path / "a")
    assert sae.config.architecture == "jumprelu" and float(sae.threshold[7]) == 3.5
    for value in (
        "text",
        [],
        {"config": 3},
        {"config": {"architecture": "nope", "d_in": 1, "d_sae": 1}, "provenance": {}},
        {"config": {"architecture": "topk", "d_in": D, "d_sae": F, "params": {"k": K}}, "provenance": {}, "dtypes": {"b_dec": "float99"}},
    ):
        ANY.write(toy("topk"), tmp_path / "b")
        config = json.loads((tmp_path / "b/config.json").read_text())
        (tmp_path / "b/config.json").write_text(json.dumps({**config, "saehub": value}))
        assert same(ANY.read(tmp_path / "b"), toy("topk"))


# ---------------------------------------------------------------------- faults
BAD = {
    "no class": (lambda t: t.pop("dict_class"), "does not name trainer.dict_class"),
    "unknown class": (lambda t: t.update(dict_class="AutoEncoderTopk"), "did you mean 'AutoEncoderTopK'"),
    "wrong class": (lambda t: t.update(dict_class="AutoEncoder"), "missing: bias"),
    "wrong k": (lambda t: t.update(k=K + 1), "says k is 6, config.json 7"),
    "k a string": (lambda t: t.update(k="6"), "k is '6'"),
    "k zero": (lambda t: t.update(k=0), "k is 0"),
    "dict_size off by one": (lambda t: t.update(dict_size=F - 1), "expected [47, 16]"),
    "activation_dim wrong": (lambda t: t.update(activation_dim=17), "expected [17]"),
    "sizes swapped": (lambda t: t.update(dict_size=D, activation_dim=F), "b_dec has shape [16]"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_configs(tmp_path, fault):
    change, words = BAD[fault]
    config = config_of("AutoEncoderTopK")
    change(config["trainer"])
    folder = written(tmp_path / "theirs", config, STATES["AutoEncoderTopK"])
    with pytest.raises(FormatError) as error:
        ANY.read(folder)
    assert words in str(error.value) and str(folder) in str(error.value), str(error.value)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_pickles_that_would_execute_are_refused(tmp_path):
    """In a whole archive, bare, and hidden among good tensors: refused by name, and nothing was run."""
    marker = tmp_path / "executed"
    good = STATES["AutoEncoder"]
    folders = []
    for number, content in enumerate((Bomb(marker), {**good, "bias": Bomb(marker)}, {**good, "optimizer": Bomb(marker)})):
        folders.append(written(tmp_path / str(number), config_of("AutoEncoder"), content))
    bare = written(tmp_path / "bare", config_of("AutoEncoder"), good)
    (bare / "ae.pt").write_bytes(pickle.dumps(Bomb(marker)))
    for folder, words in [*((folder, "holds more than tensors") for folder in folders), (bare, "not a torch.save file")]:
        with pytest.raises(FormatError) as error:
            ANY.read(folder)
        assert words in str(error.value) and not marker.exists()
    torch.save({**good, "bias": __import__("fractions").Fraction(1, 2)}, bare / "ae.pt")
    with pytest.raises(FormatError, match="holds more than tensors"):
        ANY.read(bare)


def repacked(file, change) -> None:
    """The archive again with `change(entry name, bytes) -> (bytes, compression)`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content, compression = change(entry.filename, old.read(entry))
            new.writestr(zipfile.ZipInfo(entry.filename), content, compress_type=compression)
    file.write_bytes(buffer.getvalue())


def flip_bit(file) -> None:
    """One bit of one number of the largest tensor."""
    content = bytearray(file.read_bytes())
    where = content.index(struct.pack("<f", float(LINEAR["encoder.weight"][5, 3])))
    content[where + 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_bad_files(tmp_path):
    state = STATES["AutoEncoder"]
    huge = torch.zeros(1).as_strided((2**20, 2**20), (0, 0))
    stored_way, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    faults = [
        (lambda p: (p / "ae.pt").write_bytes((p / "ae.pt").read_bytes()[:5000]), "damaged, or not a torch.save file"),
        (lambda p: (p / "ae.pt").write_bytes(b""), "damaged, or not a torch.save file"),
        (lambda p: flip_bit(p / "ae.pt"), "Bad CRC-32"),
        (lambda p: repacked(p / "ae.pt", lambda name, content: (content, deflated)), "is compressed"),
        (
            lambda p: repacked(p / "ae.pt", lambda name, content: (bytes(2**25) if name.endswith("data.pkl") else content, stored_way)),
            "no state dict needs that many",
        ),
        (
            lambda p: repacked(p / "ae.pt", lambda name, content: (b"\x80\x02}" if name.endswith("data.pkl") else content, stored_way)),
            "cannot be read",
        ),
        (lambda p: (p / "ae.pt").unlink(), "ae.pt does not exist"),
        (lambda p: (p / "config.json").unlink(), "config.json does not exist"),
        (lambda p: (p / "config.json").write_text("[1]"), "is a list"),
        (lambda p: (p / "config.json").write_text("[" * 100_000), "config.json"),
        (lambda p: (p / "config.json").write_text('{"trainer": 3}'), "does not name trainer.dict_class"),
        (lambda p: torch.save([1, 2], p / "ae.pt"), "holds a list"),
        (lambda p: torch.save({1: torch.ones(1)}, p / "ae.pt"), "holds a dict"),
        (lambda p: torch.save(state | {"bias": 3.0}, p / "ae.pt"), "bias is a float"),
        (lambda p: torch.save(state | {"bias": huge}, p / "ae.pt"), "only 4 bytes are stored for it"),
        (lambda p: torch.save(state | {"bias": torch.ones(D).to_sparse()}, p / "ae.pt"), "dense tensors"),
        (
            lambda p: torch.save(state | {"decoder.weight": state["decoder.weight"].T}, p / "ae.pt"),
            "decoder.weight has shape [48, 16], transposed",
        ),
        (lambda p: torch.save({n: t for n, t in state.items() if n != "bias"}, p / "ae.pt"), "missing: bias"),
        (lambda p: torch.save({n: t for n, t in state.items() if n != "encoder.weight"}, p / "ae.pt"), "no matrix encoder.weight"),
        (lambda p: torch.save(state | {"extra": torch.ones(2)}, p / "ae.pt"), "not expected: extra"),
        (lambda p: torch.save(state | {"bias": torch.full((D,), float("inf"))}, p / "ae.pt"), "bias holds 16 values"),
        (lambda p: torch.save(state | {"bias": torch.zeros(D, dtype=torch.int64)}, p / "ae.pt"), "dtype"),
        (lambda p: torch.save({"step": 1, "ae": state, "norm_factor": -1}, p / "ae.pt"), "norm_factor is -1"),
        (lambda p: torch.save(state, p / "ae.pt", _use_new_zipfile_serialization=False), "before torch 1.6"),
    ]
    for number, (change, words) in enumerate(faults):
        folder = written(tmp_path / str(number), config_of("AutoEncoder"), state)
        change(folder)
        with pytest.raises(FormatError) as error:
            ANY.read(folder)
        assert words in str(error.value), (number, str(error.value))
    for odd in (
        tmp_path / "nothing",
        tmp_path,
        tmp_path / "0/config.json",
        tmp_path / "6",
        tmp_path / "7",
        tmp_path / "8",
        tmp_path / "10",
    ):
        assert not ANY.sniff(odd), odd


def test_an_identity_cannot_claim_any_width(tmp_path):
    with pytest.raises(FormatError, match="activation_dim is 1000000"):
        ANY.read(written(tmp_path, config_of("IdentityDict", activation_dim=10**6), {}))


def test_an_autoencoder_that_the_library_will_rescale_is_written_with_a_caution(toy, tmp_path):
    with pytest.warns(UserWarning, match="load_dictionary multiplies the features"):
        ANY.write(toy("relu"), tmp_path / "a")
    unit = toy("relu")
    unit = SAE.build(unit.config, unit.tensors() | {"W_dec": torch.nn.functional.normalize(unit.W_dec.detach(), dim=1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ANY.write(unit, tmp_path / "b")
        ANY.write(toy("relu", subtract_b_dec=False), tmp_path / "c")  # AutoEncoderNew is loaded as it is


def test_float64_is_kept(toy, tmp_path):
    sae = toy("batchtopk", dtype=torch.float64)
    ANY.write(sae, tmp_path)
    assert same(ANY.read(tmp_path), sae) and stored(tmp_path)["threshold"].dtype == torch.float64


def test_matryoshka_groups_must_fit(tmp_path):
    for sizes in ([12, 35], [0, 48], [-1, 49], []):
        state = STATES["MatryoshkaBatchTopKSAE"] | {"group_sizes": torch.tensor(sizes, dtype=torch.int64)}
        with pytest.raises(FormatError, match="group_sizes"):
            ANY.read(written(tmp_path / str(len(list(tmp_path.iterdir()))), config_of("MatryoshkaBatchTopKSAE"), state))


def test_the_plugin_is_light():
    code = "import sys, saehub_dictionary_learning as p; c, = p.saehub_exporters(); print(c.name, [m for m in ('torch', 'dictionary_learning') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "dictionary_learning []"
    )
    code = "import sys, saehub_dictionary_learning.codec; print([m for m in ('dictionary_learning', 'nnsight') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
