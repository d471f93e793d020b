"""Sparsify itself: what we read from runs that it trained, what it loads from our folders, and certificates made with it in a worker."""

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
from saehub.errors import CheckFailed
from saehub.pipeline.components import Components
from saehub_sparsify.codec import SparsifyFormat

TRANSCODER, SKIP = {"kind": "transcoder", "subtract_b_dec": False}, {"kind": "skip_transcoder", "subtract_b_dec": False}
OURS = {
    "topk": ("topk", {}), "groupmax": ("groupmax", {}), "transcoder": ("topk", TRANSCODER), "skip": ("topk", SKIP), "groupmax skip": ("groupmax", SKIP),
    "not subtracted": ("topk", {"subtract_b_dec": False}), "decoder norms": ("topk", {"decoder_norm_scaling": True}),
    "both folded": ("groupmax", {"subtract_b_dec": False, "decoder_norm_scaling": True}),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINED = [
    "topk/layers.0", "topk/layers.1", "groupmax/layers.1", "multi_topk/layers.0", "transcoder/layers.1.mlp", "skip/layers.1.mlp", "skip_sae/layers.1",
    "seeds/layers.1/seed3", "seeds/layers.1/seed5", "best/layers.0", "best/best/layers.1/layers.1", "adam/layers.1", "bfloat16/layers.0",
]  # fmt: skip


def of_dtype(sae: SAE, name: str) -> SAE:
    """In that dtype; `mixed`: all bfloat16 but the biases, as a checkpoint from elsewhere may be."""
    if name != "mixed":
        return sae.astype(DTYPES[name])
    cast = {n: t if n.startswith("b_") else t.bfloat16() for n, t in sae.tensors().items()}
    return SAE.build(sae.config, cast, sae.provenance)


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy) -> Path:
    """A folder with the library's own runs, our folders under `ours/`, and truth.safetensors: what the library computes with each."""
    folder = tmp_path_factory.mktemp("sparsify")
    save_file({"x": torch.randn(96, 16, generator=torch.Generator().manual_seed(99))}, folder / "rows.safetensors")
    for name, (architecture, config) in OURS.items():
        for dtype in (*DTYPES, "mixed"):
            SparsifyFormat().write(of_dtype(toy(architecture, **config), dtype), folder / "ours" / f"{name} {dtype}")
    script = Path(__file__).with_name("sparsify_writes.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def truth(made) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Folder -> features and reconstruction by the library."""
    found = load_file(made / "truth.safetensors")
    return {name.removesuffix(" f"): (found[name], found[name.removesuffix("f") + "y"]) for name in found if name.endswith(" f")}


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
def test_what_the_library_trained_is_read(made, truth, rows, name):
    """Runs by Sparsify's own trainer: topk, groupmax, multi-topk, transcoders, a skip path, several seeds, best/, Adam, bfloat16."""
    folder = made / name
    assert find_format(folder) == "sparsify/sparsify"
    sae = load(folder)
    agrees(sae, rows, truth[name])
    if "bfloat16" not in name:
        assert sae.provenance["trainer"]["config"]["sae"]["k"] == 6 and sae.provenance["tokens"] == {"context": 16}


def test_every_folder_of_the_library_is_covered(truth):
    own = {name for name in truth if not name.startswith("ours/")}
    assert set(TRAINED) <= own and len(truth) - len(own) == 4 * len(OURS)


@pytest.mark.parametrize("name", TRAINED)
def test_what_the_library_saved_comes_back_as_it_was(made, tmp_path, name):
    SparsifyFormat().write(v1.load(v1.save(load(made / name), tmp_path / "ours")), tmp_path / "back")
    was, now = (load_file(folder / "sae.safetensors") for folder in (made / name, tmp_path / "back"))
    assert was.keys() == now.keys() and all(was[n].dtype == now[n].dtype and torch.equal(was[n], now[n]) for n in was)
    assert json.loads((made / name / "cfg.json").read_text()) == json.loads((tmp_path / "back/cfg.json").read_text())


def test_sites_of_the_trained_runs(made):
    sites = {name: {k: v for k, v in load(made / name).provenance.items() if "site" in k} for name in TRAINED}
    assert sites["topk/layers.1"] == {"site": "resid_post.1"} and sites["seeds/layers.1/seed3"] == {"site": "resid_post.1"}
    assert sites["skip/layers.1.mlp"] == {"site": "mlp_in.1", "target_site": "mlp_out.1"}
    assert sites["skip_sae/layers.1"] == {"site": "resid_post.1", "target_site": "resid_post.1"}


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
@pytest.mark.parametrize("name", OURS)
def test_the_library_loads_what_we_write(toy, truth, rows, name, dtype):
    """`SparseCoder.load_from_disk` on our folders, its encode and decode against our float64 of the SAE that was written."""
    architecture, config = OURS[name]
    agrees(of_dtype(toy(architecture, **config), dtype), rows, truth[f"ours/{name} {dtype}"])


@pytest.mark.parametrize("name", ["skip/layers.1.mlp", "multi_topk/layers.0", "ours/groupmax skip mixed"])
def test_run_is_the_library(made, truth, rows, invoke, name):
    """The exporter's `run`, in a worker: bit for bit what the library computed in a process of its own."""
    from saehub.plugins import catalog

    features, reconstruction = invoke(catalog().find("exporter", "sparsify"), None, "run", path=made / name, x_ND=rows)
    assert torch.equal(features, truth[name][0]) and torch.allclose(reconstruction, truth[name][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_certificates(toy, rows, tmp_path, invoke, name):
    """saehub -> Sparsify -> saehub, certified by both; bit-exact unless something was folded."""
    architecture, config = OURS[name]
    sae = toy(architecture, **config)
    v1.save(sae, tmp_path / "a", probe=make_probe(sae, rows))
    there = convert(tmp_path / "a", tmp_path / "b", "sparsify", invoke=invoke)
    back = convert(tmp_path / "b", tmp_path / "c", "saehub", invoke=invoke)
    assert there.outcome == back.outcome == "verified by the target's library", (str(there), str(back))
    assert there.support["unexplained"] == back.support["unexplained"] == 0 and there.latents_exercised > 0.3 and not back.changed
    changed = {"not subtracted": {"b_enc"}, "decoder norms": {"W_enc", "b_enc", "W_dec"}, "both folded": {"W_enc", "b_enc", "W_dec"}}
    assert set(there.changed) == changed.get(name, set()) and bool(there.folded) == (name in changed)
    assert "eai-sparsify" in there.target["versions"]


@pytest.mark.parametrize("name", ["skip_sae/layers.1", "seeds/layers.1", "bfloat16/layers.0", "groupmax/layers.1"])
def test_trained_checkpoints_get_certificates(made, tmp_path, invoke, name):
    path = made / name if (made / name / "cfg.json").exists() else made / name / "seed5"
    certificate = convert(path, tmp_path / "a", "saehub", invoke=invoke)
    assert certificate.passed and not certificate.changed, str(certificate)


FAULTS = {
    "k off by one": lambda f: f.config.update(k=f.config["k"] + 1),
    "read as a transcoder": lambda f: f.config.update(transcode=True),
    "groupmax for topk": lambda f: f.config.update(activation="groupmax"),
    "decoder in bf16": lambda f: f.tensors.update(W_dec=f.tensors["W_dec"].bfloat16().float()),
    "encoder rows swapped": lambda f: f.tensors.update({"encoder.weight": f.tensors["encoder.weight"][[1, 0, *range(2, 48)]]}),
    "bias of the wrong sign": lambda f: f.tensors.update(b_dec=-f.tensors["b_dec"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_sparsify_folder_gets_no_certificate(toy, tmp_path, monkeypatch, invoke, fault):
    """Faults as careless converters make them, put into what our writer writes: the library then computes something else."""
    from saehub_sparsify import mapping

    honest = mapping.to_sparsify

    def careless(sae: SAE):
        foreign = honest(sae)
        foreign.beside = None
        FAULTS[fault](foreign)
        return foreign

    v1.save(toy("topk"), tmp_path / "a")
    monkeypatch.setattr("saehub_sparsify.codec.to_sparsify", careless)
    with pytest.raises(Refused):
        convert(tmp_path / "a", tmp_path / "b", "sparsify", invoke=invoke)
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore:.*signed")
def test_a_signed_checkpoint_is_read_but_not_run(made, tmp_path, invoke):
    """Today's library ignores the word and computes topk: the hub neither believes it nor pretends to have verified."""
    for file in ("cfg.json", "sae.safetensors"):
        (tmp_path / "signed").mkdir(exist_ok=True)
        (tmp_path / "signed" / file).write_bytes((made / "topk/layers.0" / file).read_bytes())
    cfg = json.loads((tmp_path / "signed/cfg.json").read_text())
    (tmp_path / "signed/cfg.json").write_text(json.dumps({**cfg, "signed": True}))
    with pytest.raises(CheckFailed, match="cannot compute this SAE") as error:
        convert(tmp_path / "signed", tmp_path / "a", "saelens", invoke=invoke)
    assert "--no-verify" in error.value.fix and not (tmp_path / "a").exists()
    certificate = convert(tmp_path / "signed", tmp_path / "a", "saelens", verify=False)
    assert certificate.outcome == "unverified" and json.loads((tmp_path / "a/cfg.json").read_text())["architecture"] == "abstopk"
