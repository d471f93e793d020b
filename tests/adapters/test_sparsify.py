"""The Sparsify codec without the library: configs of every year, runs' folders, sites, faults, and what cannot be said."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.load import find_format, load
from saehub.checkpoint.sae import SAE
from saehub.errors import CheckFailed, FormatError
from saehub_sparsify.codec import SparsifyFormat

pytestmark = pytest.mark.quick
D, F, K = 16, 48, 6
TODAY = {
    "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K, "multi_topk": False,
    "skip_connection": False, "transcode": False, "d_in": D,
}  # fmt: skip
TRANSCODER = {"kind": "transcoder", "subtract_b_dec": False}
SKIP = {"kind": "skip_transcoder", "subtract_b_dec": False}
SAYABLE = [
    ("topk", {}, False), ("groupmax", {}, False), ("topk", TRANSCODER, False), ("groupmax", TRANSCODER, False), ("topk", SKIP, False),
    ("groupmax", SKIP, False), ("topk", {"subtract_b_dec": False}, True), ("topk", {"decoder_norm_scaling": True}, True),
    ("groupmax", {"decoder_norm_scaling": True, "subtract_b_dec": False}, True), ("topk", {**SKIP, "decoder_norm_scaling": True}, True),
]  # fmt: skip
UNSAYABLE = [
    ("relu", {}, "no relu"), ("gated", {}, "no gated"), ("jumprelu", {}, "no jumprelu"), ("batchtopk", {}, "no batchtopk"),
    ("matryoshka", {}, "no matryoshka"), ("abstopk", {}, "no abstopk"), ("matching_pursuit", {}, "no matching_pursuit"),
    ("topk", {"norm_in": "layer_norm", "norm_out": "layer_norm"}, "layer_norm"), ("topk", {**TRANSCODER, "d_out": 9}, "d_out 9 must be d_in 16"),
]  # fmt: skip
PROVENANCE = {
    "site": "mlp_out.2",
    "model": {"name": "org/model", "revision": "abc"},
    "origin": {"format": "elsewhere", "config": {"π": [1, 2.5, None]}},
}


def theirs(*, dtype=torch.float32, skip: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under Sparsify's names."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)} | ({"W_skip": (D, D)} if skip else {})
    return {name: (torch.randn(shape, generator=draw) * 0.5).to(dtype) for name, shape in shapes.items()}


def written(folder, config: dict, tensors: dict):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae.safetensors")
    return folder


def read(folder) -> SAE:
    """`read`, warnings about old files aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SparsifyFormat().read(folder)


def equation(
    tensors: dict, x: torch.Tensor, *, k: int = K, subtract: bool = True, choose: str = "topk"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction in float64, from Sparsify's source in words: written here a second time, without saehub."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = x.double()
    p = (x - t["b_dec"] if subtract else x) @ t["encoder.weight"].T + t["encoder.bias"]
    if choose == "groupmax":
        mask = torch.zeros_like(p).scatter(1, p.unflatten(1, (k, -1)).argmax(2) + torch.arange(0, F, F // k), 1.0)
    else:
        mask = torch.zeros_like(p).scatter(1, (p.abs() if choose == "signed" else p).topk(k, dim=1).indices, 1.0)
    f = (p if choose == "signed" else p.clamp(min=0)) * mask
    return f, f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "W_skip" in t else 0)


def agrees(sae: SAE, x: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], gap: float = 1e-12) -> bool:
    f, y = sae.encode(x, dtype=torch.float64), sae(x, dtype=torch.float64)
    equal = torch.equal(f != 0, expected[0] != 0)
    return (
        equal
        and bool((f - expected[0]).abs().max() <= gap * expected[0].abs().max())
        and bool((y - expected[1]).norm() <= gap * expected[1].norm())
    )


def same(a: SAE, b: SAE) -> bool:
    ours, others = a.tensors(), b.tensors()
    return (
        a.config == b.config
        and ours.keys() == others.keys()
        and all(ours[n].dtype == others[n].dtype and torch.equal(ours[n], others[n]) for n in ours)
    )


# ---------------------------------------------------------------------- there and back
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "config", "folds"), SAYABLE)
def test_there_and_back(toy, rows, tmp_path, architecture, config, folds, dtype):
    """saehub -> Sparsify -> saehub: bits, config and provenance; where a flag has no word, the same function and a note."""
    sae, codec = toy(architecture, dtype=dtype, provenance=PROVENANCE, **config), SparsifyFormat()
    notes = codec.write(sae, tmp_path)
    again = codec.read(tmp_path)
    assert codec.sniff(tmp_path) and again.provenance == PROVENANCE and bool(notes["folded"]) == folds
    assert all(torch.equal(again.tensors()[name], sae.tensors()[name]) for name in notes["bit_exact"])
    cfg, stored = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae.safetensors")
    assert cfg.keys() == TODAY.keys() and cfg["num_latents"] == F and stored["encoder.weight"].shape == stored["W_dec"].shape == (F, D)
    assert cfg["transcode"] == (sae.config.kind != "autoencoder") and cfg["skip_connection"] == ("W_skip" in stored)
    if not folds:
        assert same(sae, again) and set(notes["bit_exact"]) == set(sae.tensors()) and stored["W_dec"].dtype == dtype
    f, f2 = sae.encode(rows, dtype=torch.float64), again.encode(rows, dtype=torch.float64)
    y, y2 = sae(rows, dtype=torch.float64), again(rows, dtype=torch.float64)
    rows_equal = ((f != 0) == (f2 != 0)).all(1)
    assert (
        rows_equal.double().mean() > 0.98
        and torch.allclose(f[rows_equal], f2[rows_equal], atol=1e-5)
        and torch.allclose(y[rows_equal], y2[rows_equal], atol=1e-5)
    )
    assert agrees(again, rows, equation(stored, rows, subtract=not cfg["transcode"], choose=cfg["activation"]))


@pytest.mark.parametrize(("architecture", "config", "words"), UNSAYABLE)
def test_what_cannot_be_said_is_refused(toy, tmp_path, architecture, config, words):
    sae, codec = toy(architecture, **config), SparsifyFormat()
    assert words in codec.refusal(sae)
    with pytest.raises(CheckFailed, match=words):
        codec.write(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists() and codec.refusal(toy("topk")) is None


def test_normalize_decoder_says_whether_rows_have_length_1(toy, tmp_path):
    """It makes Sparsify normalise them when it trains on: false for rows that are not, and for transcoders, which it never normalises."""
    unit = toy("topk")
    unit = SAE.build(unit.config, unit.tensors() | {"W_dec": torch.nn.functional.normalize(unit.W_dec.detach(), dim=1)})
    for name, sae, expected in (("a", unit, True), ("b", toy("topk"), False), ("c", toy("topk", **TRANSCODER), False)):
        SparsifyFormat().write(sae, tmp_path / name)
        assert json.loads((tmp_path / name / "cfg.json").read_text())["normalize_decoder"] is expected


def test_mixed_dtypes(toy, rows, tmp_path):
    """Kept as they are on the way through; an SAE from elsewhere is widened, since the library casts all tensors to one dtype, and comes back."""
    mixed = theirs(dtype=torch.bfloat16) | {"b_dec": theirs()["b_dec"], "encoder.bias": theirs()["encoder.bias"]}
    folder = written(tmp_path / "theirs", TODAY, mixed)
    with pytest.warns(UserWarning, match="tensors of bfloat16 and float32 are kept"):
        sae = SparsifyFormat().read(folder)
    assert sae.W_dec.dtype == torch.bfloat16 and sae.b_dec.dtype == torch.float32
    SparsifyFormat().write(v1.load(v1.save(sae, tmp_path / "ours")), tmp_path / "back")
    back = load_file(tmp_path / "back/sae.safetensors")
    assert all(back[name].dtype == mixed[name].dtype and torch.equal(back[name], mixed[name]) for name in mixed)
    stranger = SAE.build(sae.config, sae.tensors(), PROVENANCE)
    notes = SparsifyFormat().write(stranger, tmp_path / "wide")
    assert {t.dtype for t in load_file(tmp_path / "wide/sae.safetensors").values()} == {torch.float32}
    assert "stored as float32" in notes["folded"][0] and same(SparsifyFormat().read(tmp_path / "wide"), stranger)


FOREIGN = {
    "today": TODAY,
    "num_latents 0": {**TODAY, "num_latents": 0, "expansion_factor": 3},
    "groupmax": {**TODAY, "activation": "groupmax"},
    "multi-topk": {**TODAY, "multi_topk": True},
    "transcoder": {**TODAY, "transcode": True},
    "skip transcoder": {**TODAY, "transcode": True, "skip_connection": True},
    "unknown words": {**TODAY, "future": {"a": [1, None]}},
    "2024-06": {"expansion_factor": 3, "normalize_decoder": True, "k": K, "d_in": D},
    "2024-08": {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K, "multi_topk": True, "d_in": D},
    "2024-12 with a skip path": {"expansion_factor": 3, "normalize_decoder": False, "num_latents": F, "k": K, "multi_topk": False, "skip_connection": True, "d_in": D},
    "a skip path, no transcoder": {**TODAY, "skip_connection": True},
    "signed": {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K, "signed": True, "d_in": D},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_folder_computes_what_it_says_and_comes_back_as_it_was(rows, tmp_path, case, dtype):
    """Sparsify -> saehub (on disk) -> Sparsify: every tensor's bits, every key of cfg.json; and the equation of that year in between."""
    config = FOREIGN[case]
    tensors = theirs(dtype=dtype, skip=config.get("skip_connection", False))
    sae = read(written(tmp_path / "theirs", config, tensors))
    choose = "signed" if config.get("signed") else config.get("activation", "topk")
    folds = config.get("skip_connection", False) and not config.get("transcode", False)
    expected = equation(tensors, rows, subtract=not config.get("transcode", False), choose=choose)
    assert agrees(sae, rows, expected, gap=1e-6 if folds else 1e-12)
    assert (sae.config.kind, sae.config.subtract_b_dec) == (
        ("skip_transcoder", False)
        if config.get("skip_connection")
        else ("transcoder", False)
        if config.get("transcode")
        else ("autoencoder", True)
    )
    notes = SparsifyFormat().write(v1.load(v1.save(sae, tmp_path / "ours")), tmp_path / "back")
    assert json.loads((tmp_path / "back/cfg.json").read_text()) == config
    stored = load_file(tmp_path / "back/sae.safetensors")
    assert stored.keys() == tensors.keys() and all(stored[n].dtype == dtype and torch.equal(stored[n], tensors[n]) for n in tensors)
    assert set(notes["bit_exact"]) == set(sae.tensors()) and not notes["folded"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FOREIGN["2024-08"], "does not say whether this is a transcoder"),
        (FOREIGN["2024-12 with a skip path"], "does not say whether the input of the module is read"),
        (FOREIGN["2024-12 with a skip path"], "b_dec W_enc was folded into b_enc"),
        (FOREIGN["signed"], "signed: true is read by the equation of 2024"),
    ],
)
def test_old_files_come_with_a_caution(tmp_path, config, words):
    folder = written(tmp_path / "old", config, theirs(skip=config.get("skip_connection", False)))
    with pytest.warns(UserWarning, match=words):
        sae = SparsifyFormat().read(folder)
    assert any(words in caution for caution in sae.provenance["cautions"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "cautions" not in SparsifyFormat().read(written(tmp_path / "new", TODAY, theirs())).provenance


def test_what_reading_folds_is_named(toy, tmp_path):
    """For the certificate; not for a folder that only remembers a fold from before."""
    folder = written(tmp_path / "old", FOREIGN["2024-12 with a skip path"], theirs(skip=True))
    assert SparsifyFormat().folds(folder) == ["b_dec W_enc into b_enc (the encoder does not subtract b_dec there)"]
    changed = read(folder).scale_input(0.5)
    SparsifyFormat().write(changed, tmp_path / "changed")
    assert SparsifyFormat().folds(tmp_path / "changed") == [] and same(SparsifyFormat().read(tmp_path / "changed"), changed)
    assert SparsifyFormat().folds(written(tmp_path / "new", TODAY, theirs())) == []


def test_the_command_line_says_cautions_in_one_line(tmp_path, monkeypatch, capsys):
    from saehub.cli.main import _print_cautions_plainly, run

    folder = written(tmp_path / "old", FOREIGN["signed"], theirs())
    with warnings.catch_warnings():  # puts showwarning back
        warnings.simplefilter("always")
        _print_cautions_plainly()
        assert run(["inspect", str(folder)]) == 0
    said = capsys.readouterr().err
    assert f"caution: {folder}: signed: true is read by the equation of 2024" in said.replace("\n", " ")
    assert "Caution" not in said and "codec(name)" not in said


def test_defaults_are_the_librarys(tmp_path):
    """cfg.json needs d_in only: k 32 and expansion 32 otherwise."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "encoder.weight": torch.randn(64, 2, generator=draw),
        "encoder.bias": torch.zeros(64),
        "W_dec": torch.randn(64, 2, generator=draw),
        "b_dec": torch.zeros(2),
    }
    sae = SparsifyFormat().read(written(tmp_path, {"d_in": 2}, tensors))
    assert sae.config.d_sae == 64 and sae.config.params["k"] == 32 and sae.config.architecture == "topk"


# ---------------------------------------------------------------------- runs, hookpoints, sites
RUN = {"sae": {"k": K}, "hookpoints": ["layers.0", "layers.1.mlp"], "ctx_len": 64}


def run_folder(folder, places: list[str], run: dict | None = RUN, config: dict = TODAY):
    for seed, place in enumerate(places):
        written(folder / place, config, theirs(seed=seed))
    if run:
        (folder / "config.json").write_text(json.dumps(run))
    return folder


def test_a_run_with_several_hookpoints_lists_them(tmp_path):
    places = ["layers.10", "layers.2", "layers.2.mlp/seed0", "layers.2.mlp/seed1", "best/layers.10/layers.10"]
    folder, codec = run_folder(tmp_path / "run", places), SparsifyFormat()
    assert codec.sniff(folder)
    for reader in (codec.read, load):
        with pytest.raises(FormatError) as error:
            reader(folder)
        assert "holds 5 Sparsify checkpoints" in error.value.what
        assert error.value.fix.endswith("layers.2, layers.2.mlp/seed0, layers.2.mlp/seed1, layers.10, best/layers.10/layers.10")
    assert find_format(folder / "layers.2.mlp/seed1") == "sparsify/sparsify"
    assert torch.equal(codec.read(folder / "layers.2.mlp/seed1").b_dec, theirs(seed=3)["b_dec"])


def test_a_run_with_one_hookpoint_is_that_one(tmp_path):
    folder = run_folder(tmp_path / "run", ["layers.1.mlp/seed7"])
    sae = load(folder)
    assert torch.equal(sae.b_dec, theirs()["b_dec"]) and sae.provenance["trainer"]["seed"] == 7


def test_folders_that_hold_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    assert not SparsifyFormat().sniff(tmp_path)
    with pytest.raises(FormatError, match="not a Sparsify checkpoint"):
        SparsifyFormat().read(tmp_path)
    assert not SparsifyFormat().sniff(run_folder(tmp_path / "other", ["a"], run=None))  # no run's config: a folder of folders is nobody's


LLAMA, NOWHERE = "builtin/tiny-llama", "nowhere/unknown"


@pytest.mark.parametrize(
    ("place", "model", "config", "expected"),
    [
        ("layers.2", LLAMA, TODAY, {"site": "resid_post.2"}),
        ("layers.2", NOWHERE, TODAY, {"site": "resid_post.2"}),
        ("layers.2.mlp", LLAMA, TODAY, {"site": "mlp_out.2"}),
        ("layers.2.mlp", NOWHERE, TODAY, {"unknown_site": "layers.2.mlp"}),  # Gemma 2 norms what its MLP gives
        ("h.5.mlp", NOWHERE, TODAY, {"site": "mlp_out.5"}),
        ("layers.2.self_attn", LLAMA, TODAY, {"site": "attn_out.2"}),
        ("layers.2.mlp", LLAMA, {**TODAY, "transcode": True}, {"site": "mlp_in.2", "target_site": "mlp_out.2"}),
        ("layers.2", LLAMA, {**TODAY, "transcode": True}, {"site": "resid_pre.2", "target_site": "resid_post.2"}),
        ("layers.2.mlp", NOWHERE, {**TODAY, "transcode": True}, {"site": "mlp_in.2", "unknown_target_site": "layers.2.mlp"}),
        ("layers.2.mlp/seed4", LLAMA, TODAY, {"site": "mlp_out.2"}),
        ("embed_tokens", LLAMA, TODAY, {"site": "embed"}),
        ("layers.2.strange", LLAMA, TODAY, {"site": "model.layers.2.strange:out"}),
        ("vision.blocks.3", LLAMA, TODAY, {"unknown_site": "vision.blocks.3"}),
        ("my-sae", LLAMA, TODAY, {}),
    ],
)
def test_hookpoints_become_sites_or_stay_as_they_are(tmp_path, place, model, config, expected):
    folder = run_folder(tmp_path / "run", [place], {**RUN, "model": model, "dataset": "some/text"}, config) / place
    provenance = SparsifyFormat().read(folder).provenance
    assert {key: value for key, value in provenance.items() if "site" in key} == expected
    assert (
        provenance["model"] == {"name": model} and provenance["data"] == {"name": "some/text"} and provenance["tokens"] == {"context": 64}
    )


def test_old_runs_say_in_their_own_config_what_cfg_json_does_not(rows, tmp_path):
    """2024-11 to 2025-02: `transcode` stood in the run's config.json, and b_dec was subtracted all the same."""
    old = FOREIGN["2024-08"]
    for transcode, kind in ((True, "transcoder"), (False, "autoencoder")):
        folder = run_folder(tmp_path / kind, ["layers.1"], {**RUN, "transcode": transcode, "model": LLAMA}, old) / "layers.1"
        sae = read(folder)
        assert sae.config.kind == kind and sae.config.subtract_b_dec != transcode
        assert agrees(sae, rows, equation(theirs(), rows), gap=1e-6 if transcode else 1e-12)
        assert sae.provenance.get("target_site") == ("resid_post.1" if transcode else None)
        SparsifyFormat().write(v1.load(v1.save(sae, tmp_path / f"{kind}-ours")), tmp_path / f"{kind}-back")
        assert json.loads((tmp_path / f"{kind}-back/cfg.json").read_text()) == old
        assert torch.equal(load_file(tmp_path / f"{kind}-back/sae.safetensors")["encoder.bias"], theirs()["encoder.bias"])


# ---------------------------------------------------------------------- what changed since
def test_a_changed_sae_does_not_get_its_old_config(rows, tmp_path):
    sae = SparsifyFormat().read(written(tmp_path / "theirs", TODAY, theirs()))
    fewer = SAE.build(sae.config.replace(params={"k": 3}), sae.tensors(), sae.provenance)
    SparsifyFormat().write(fewer, tmp_path / "fewer")
    assert json.loads((tmp_path / "fewer/cfg.json").read_text())["k"] == 3 and same(SparsifyFormat().read(tmp_path / "fewer"), fewer)
    # other units: what was folded on reading must not come back
    old = read(written(tmp_path / "old", FOREIGN["2024-12 with a skip path"], theirs(skip=True)))
    scaled = old.scale_input(0.5)
    SparsifyFormat().write(scaled, tmp_path / "scaled")
    assert json.loads((tmp_path / "scaled/cfg.json").read_text())["transcode"] is True and same(
        SparsifyFormat().read(tmp_path / "scaled"), scaled
    )


def test_the_side_channel_never_overrules_the_folder(toy, tmp_path):
    """Edited after saehub wrote it: tensors and k count as they stand."""
    codec = SparsifyFormat()
    codec.write(toy("topk", provenance=PROVENANCE), tmp_path / "a")
    cfg = json.loads((tmp_path / "a/cfg.json").read_text())
    (tmp_path / "a/cfg.json").write_text(json.dumps({**cfg, "k": 2}))
    sae = codec.read(tmp_path / "a")
    assert sae.config.params["k"] == 2 and sae.provenance["origin"]["format"] == "sparsify"
    codec.write(toy("topk", provenance=PROVENANCE), tmp_path / "b")
    stored = load_file(tmp_path / "b/sae.safetensors")
    stored["b_dec"][0] += 1
    from safetensors import safe_open

    with safe_open(tmp_path / "b/sae.safetensors", "pt") as stream:
        header = stream.metadata()
    save_file(stored, tmp_path / "b/sae.safetensors", header)
    assert torch.equal(codec.read(tmp_path / "b").b_dec, stored["b_dec"])
    for words in ("text", "[]", "{", "[" * 5000, '{"config": 3}', '{"config": {"architecture": "nope", "d_in": 1, "d_sae": 1}, "provenance": {}}',
                  '{"config": {"architecture": "relu", "d_in": 16, "d_sae": 48}, "provenance": {}, "tensors": {"b_enc": {"dtype": "float32", "shape": [-1], "base64": "!"}}}'):  # fmt: skip
        save_file(stored, tmp_path / "b/sae.safetensors", {"saehub": words})
        assert codec.read(tmp_path / "b").config.architecture == "topk"


# ---------------------------------------------------------------------- faults
BAD = {
    "unknown activation": (lambda c: c.update(activation="topkk"), "did you mean 'topk'"),
    "batchtopk from a branch": (lambda c: c.update(activation="batchtopk"), "'batchtopk' cannot be read"),
    "d_in missing": (lambda c: c.pop("d_in"), "d_in is None"),
    "d_in a string": (lambda c: c.update(d_in="16"), "d_in is '16'"),
    "d_in huge": (lambda c: c.update(d_in=2**40), "d_in is"),
    "num_latents off by one": (lambda c: c.update(num_latents=F - 1), "expected [47, 16]"),
    "num_latents negative": (lambda c: c.update(num_latents=-1), "num_latents is -1"),
    "wrong expansion": (lambda c: c.update(num_latents=0, expansion_factor=4), "expected [64, 16]"),
    "k zero": (lambda c: c.update(k=0), "k is 0"),
    "k above d_sae": (lambda c: c.update(k=F + 1), "parameter 'k' is 49"),
    "k does not divide": (lambda c: c.update(activation="groupmax", k=5), "k must divide d_sae"),
    "a flag that is no flag": (lambda c: c.update(transcode="yes"), "transcode is 'yes'"),
    "skip flag without W_skip": (lambda c: c.update(skip_connection=True), "missing: W_skip"),
    "signed groupmax": (lambda c: c.update(signed=True, activation="groupmax"), "no version of sparsify had both"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_configs(tmp_path, fault):
    change, words = BAD[fault]
    config = dict(TODAY)
    change(config)
    folder = written(tmp_path / "theirs", config, theirs())
    with pytest.raises(FormatError) as error:
        SparsifyFormat().read(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


def test_bad_files(tmp_path):
    tensors, codec, weights = theirs(), SparsifyFormat(), "sae.safetensors"
    whole = (written(tmp_path / "whole", TODAY, tensors) / weights).read_bytes()
    faults = [
        (lambda p: (p / weights).write_bytes(whole[: len(whole) // 2]), "cannot be read"),
        (lambda p: (p / weights).write_bytes(b"\x80\x04pickle"), "cannot be read"),
        (lambda p: (p / weights).unlink(), "does not exist"),
        (lambda p: (p / "cfg.json").unlink(), "does not exist"),
        (lambda p: (p / "cfg.json").write_text("[1]"), "is a list"),
        (lambda p: (p / "cfg.json").write_text("[" * 100_000), "cfg.json"),
        (lambda p: save_file(tensors | {"W_dec": tensors["W_dec"].T.contiguous()}, p / weights), "W_dec has shape [16, 48], transposed"),
        (lambda p: save_file({n: t for n, t in tensors.items() if n != "b_dec"}, p / weights), "missing: b_dec"),
        (lambda p: save_file(tensors | {"extra": torch.ones(2)}, p / weights), "not expected: extra"),
        (lambda p: save_file(tensors | {"b_dec": torch.full((D,), float("nan"))}, p / weights), "b_dec holds 16 values"),
        (lambda p: save_file(tensors | {"W_skip": torch.ones(D, D)}, p / weights), "not expected: W_skip"),
        (lambda p: save_file(tensors | {"b_dec": torch.zeros(D, dtype=torch.int64)}, p / weights), "dtype"),
    ]
    for number, (change, words) in enumerate(faults):
        folder = written(tmp_path / str(number), TODAY, tensors)
        change(folder)
        with pytest.raises(FormatError) as error:
            codec.read(folder)
        assert words in str(error.value), (number, str(error.value))
    for odd in (tmp_path / "nothing", tmp_path, tmp_path / "0/cfg.json", tmp_path / "4", tmp_path / "5"):
        assert not codec.sniff(odd)


def test_the_plugin_is_light():
    code = "import sys, saehub_sparsify; c, = saehub_sparsify.saehub_exporters(); print(c.name, dict(c.env)['SPARSIFY_DISABLE_TRITON'], [m for m in ('torch', 'sparsify') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "sparsify 1 []"
    code = "import sys, saehub_sparsify.codec; print([m for m in ('sparsify', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
