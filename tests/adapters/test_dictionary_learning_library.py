"""dictionary_learning itself: what we read from dictionaries that it trained, what it loads from our folders, and certificates made with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.convert import Refused, convert
from saehub.checkpoint.load import find_format, load
from saehub.checkpoint.probe import make_probe
from saehub.checkpoint.sae import SAE
from saehub.pipeline.components import Components
from saehub.plugins import catalog
from saehub_dictionary_learning.codec import DictionaryLearningFormat

pytestmark = pytest.mark.filterwarnings("ignore:.*decoder rows have lengths", "ignore:.*backup", "ignore:.*rows divided by")
OURS = {
    "relu": ("relu", {}), "new": ("relu", {"subtract_b_dec": False}), "topk": ("topk", {}), "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}), "jumprelu": ("jumprelu", {"subtract_b_dec": False}), "gated": ("gated", {}),
    "topk folded": ("topk", {"subtract_b_dec": False, "decoder_norm_scaling": True}), "relu norms": ("relu", {"decoder_norm_scaling": True}),
    "jumprelu folded": ("jumprelu", {}), "gated folded": ("gated", {"subtract_b_dec": False}), "batchtopk expanded": ("batchtopk", {"subtract_b_dec": False}),
    "matryoshka norms": ("matryoshka", {"decoder_norm_scaling": True}),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINERS = ("standard", "april", "topk", "batchtopk", "matryoshka", "jumprelu", "gated", "panneal", "gated_anneal")
TRAINED = [
    *(f"{run}/{name}" for run in ("plain", "normalized") for name in TRAINERS),
    *(f"half/{name}" for name in ("topk", "batchtopk", "jumprelu", "gated")),
    "new", "identity", "old", "backup",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy) -> Path:
    """A folder with the library's own dictionaries, our folders under `ours/`, and truth.safetensors: what the library computes with each."""
    folder = tmp_path_factory.mktemp("dictionary_learning")
    save_file({"x": 3 * torch.randn(96, 16, generator=torch.Generator().manual_seed(99))}, folder / "rows.safetensors")
    for name, (architecture, config) in OURS.items():
        for word, dtype in DTYPES.items():
            DictionaryLearningFormat().write(toy(architecture, dtype=dtype, **config), folder / "ours" / f"{name} {word}")
    script = Path(__file__).with_name("dictionary_learning_writes.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def truth(made) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Folder -> features and reconstruction by the library."""
    found = load_file(made / "truth.safetensors")
    return {name.removesuffix(" f"): (found[name], found[name.removesuffix("f") + "y"]) for name in found if name.endswith(" f")}


@pytest.fixture(scope="module")
def x(made) -> torch.Tensor:
    return load_file(made / "rows.safetensors")["x"]


@pytest.fixture(scope="module")
def invoke():
    """Exporters' methods in workers that live as long as the module."""
    with Components() as components:
        remotes: dict = {}

        def call(registered, config, method, **kwargs):
            if registered.address not in remotes:
                remotes[registered.address] = components.make(registered, config)
            return getattr(remotes[registered.address], method)(**kwargs)

        yield call


def agrees(sae: SAE, x: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Our float64 against the library's float32: one support, features and reconstruction within rounding."""
    f, y = sae.encode(x, dtype=torch.float64), sae(x, dtype=torch.float64)
    assert torch.equal(f != 0, expected[0] != 0) and float((f != 0).double().mean()) > 0.03
    assert float((f - expected[0]).abs().max() / f.abs().max()) < 5e-6 and float((y - expected[1]).norm() / y.norm()) < 1e-6


@pytest.mark.parametrize("name", TRAINED)
def test_what_the_library_saved_is_read(made, truth, x, name):
    """All nine trainers, with and without normalised activations, half precision, an old file, a backup: `load_dictionary`'s own results."""
    assert find_format(made / name) == "dictionary_learning/dictionary_learning"
    sae = load(made / name)
    agrees(sae, x, truth[name])
    if "/" in name:
        expected = {"site": "resid_post.3"} if "topk" in name or "matryoshka" in name else {"unknown_site": "layer 3"}
        assert {key: value for key, value in sae.provenance.items() if "site" in key} == expected
        assert sae.provenance["model"] == {"name": "builtin/tiny-llama"}


def test_every_folder_of_the_library_is_covered(truth):
    assert set(TRAINED) == {name for name in truth if not name.startswith("ours/")} and len(truth) - len(TRAINED) == 2 * len(OURS)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "backup"])
def test_what_the_library_saved_comes_back_as_it_was(made, tmp_path, name):
    DictionaryLearningFormat().write(v1.load(v1.save(load(made / name), tmp_path / "ours")), tmp_path / "back")
    was, now = (torch.load(folder / "ae.pt", weights_only=True) for folder in (made / name, tmp_path / "back"))
    assert was.keys() == now.keys() and all(was[n].dtype == now[n].dtype and torch.equal(was[n], now[n]) for n in was)
    assert json.loads((made / name / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())


def test_checkpoints_within_a_run(made, x):
    file = made / "plain/topk/checkpoints/ae_5.pt"
    early, late = load(file), load(made / "plain/topk")
    assert torch.equal(early.W_dec, torch.load(file, weights_only=True)["decoder.weight"].T) and not torch.equal(early.W_dec, late.W_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS)
def test_the_library_loads_what_we_write(toy, truth, x, name, dtype):
    """`load_dictionary` on our folders, its encode and decode against our float64 of the SAE that was written."""
    architecture, config = OURS[name]
    agrees(toy(architecture, dtype=DTYPES[dtype], **config), x, truth[f"ours/{name} {dtype}"])


@pytest.mark.parametrize(
    "name", ["plain/matryoshka", "plain/april", "half/gated", "identity", "old", "backup", "ours/jumprelu folded float32"]
)
def test_run_is_the_library(made, truth, x, invoke, name):
    """The exporter's `run`, in a worker: bit for bit what the library computed in a process of its own."""
    features, reconstruction = invoke(catalog().find("exporter", "dictionary_learning"), None, "run", path=made / name, x_ND=x)
    assert torch.equal(features, truth[name][0]) and torch.equal(reconstruction, truth[name][1])


NORMS = {"W_enc", "b_enc", "W_dec"}
CHANGED = {
    "topk folded": NORMS, "relu norms": NORMS, "matryoshka norms": NORMS, "jumprelu folded": {"b_enc"}, "gated folded": {"b_gate", "b_mag"}, "batchtopk expanded": set(),
}  # fmt: skip
"""What folding changes; of an expanded threshold the side channel gives the scalar back."""


@pytest.mark.parametrize("name", OURS)
def test_certificates(toy, rows, tmp_path, invoke, name):
    """saehub -> dictionary_learning -> saehub, certified by both; bit-exact unless something was folded."""
    architecture, config = OURS[name]
    sae = toy(architecture, **config)
    v1.save(sae, tmp_path / "a", probe=make_probe(sae, rows))
    there = convert(tmp_path / "a", tmp_path / "b", "dictionary_learning", invoke=invoke)
    back = convert(tmp_path / "b", tmp_path / "c", "saehub", invoke=invoke)
    assert there.outcome == back.outcome == "verified by the target's library", (str(there), str(back))
    assert there.support["unexplained"] == back.support["unexplained"] == 0 and there.latents_exercised > 0.3 and not back.changed
    assert set(there.changed) == CHANGED.get(name, set()) and bool(there.folded) == (name in CHANGED)
    assert "dictionary-learning" in there.target["versions"]


@pytest.mark.parametrize("name", ["normalized/topk", "plain/batchtopk", "half/jumprelu", "backup", "old", "identity"])
def test_trained_dictionaries_get_certificates(made, tmp_path, invoke, name):
    certificate = convert(made / name, tmp_path / "a", "saehub", invoke=invoke)
    assert certificate.passed and not certificate.changed, str(certificate)


FAULTS = {
    "k off by one": ("topk", lambda f: (f.config["trainer"].update(k=7), f.tensors.update(k=torch.tensor(7, dtype=torch.int32)))),
    "relu for topk": ("topk", lambda f: f.config["trainer"].update(dict_class="BatchTopKSAE")),
    "bias not subtracted": (
        "relu",
        lambda f: (f.config["trainer"].update(dict_class="AutoEncoderNew"), f.tensors.update({"decoder.bias": f.tensors.pop("bias")})),
    ),
    "threshold off as by bf16": ("batchtopk", lambda f: f.tensors.update(threshold=f.tensors["threshold"] * (1 + 2.0**-9))),
    "threshold missing its unit": ("matryoshka", lambda f: f.tensors.update(threshold=f.tensors["threshold"] / 2)),
    "threshold for b_enc": ("jumprelu", lambda f: f.tensors.update(threshold=f.tensors["b_enc"], b_enc=f.tensors["threshold"])),
    "gate and magnitude swapped": ("gated", lambda f: f.tensors.update(gate_bias=f.tensors["mag_bias"], mag_bias=f.tensors["gate_bias"])),
    "decoder in bf16": ("relu", lambda f: f.tensors.update({"decoder.weight": f.tensors["decoder.weight"].bfloat16()})),
    "encoder rows swapped": ("topk", lambda f: f.tensors.update({"encoder.weight": f.tensors["encoder.weight"][[1, 0, *range(2, 48)]]})),
    "norm factor applied twice": (
        "relu",
        lambda f: f.tensors.update({"bias": f.tensors["bias"] * 12.5, "encoder.bias": f.tensors["encoder.bias"] * 12.5}),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_folder_gets_no_certificate(toy, tmp_path, monkeypatch, invoke, fault):
    """Faults as careless converters make them, put into what our writer writes: the library then computes something else."""
    from saehub_dictionary_learning import mapping

    architecture, change = FAULTS[fault]
    honest = mapping.to_dictionary_learning

    def careless(sae: SAE):
        foreign = honest(sae)
        foreign.beside = None
        change(foreign)
        return foreign

    v1.save(toy(architecture), tmp_path / "a")
    monkeypatch.setattr("saehub_dictionary_learning.codec.to_dictionary_learning", careless)
    with pytest.raises(Refused):
        convert(tmp_path / "a", tmp_path / "b", "dictionary_learning", invoke=invoke)
    assert not (tmp_path / "b").exists()
