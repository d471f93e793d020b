"""SAELens, Sparsify and dictionary_learning to each other: every pair that shares an architecture ends in a certificate by both libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from saehub.checkpoint.convert import Refused, convert
from saehub.checkpoint.load import codec, load
from saehub.checkpoint.sae import SAE
from saehub.pipeline.components import Components

pytestmark = pytest.mark.filterwarnings("ignore:.*decoder rows have lengths")
FORMATS = ("saelens", "sparsify", "dictionary_learning")
ARCHITECTURES = {
    "relu": ("relu", {}), "relu, b_dec not subtracted": ("relu", {"subtract_b_dec": False}), "topk": ("topk", {}), "topk, b_dec not subtracted": ("topk", {"subtract_b_dec": False}),
    "jumprelu": ("jumprelu", {}), "jumprelu, b_dec not subtracted": ("jumprelu", {"subtract_b_dec": False}), "gated": ("gated", {}),
    "batchtopk": ("batchtopk", {}), "matryoshka": ("matryoshka", {}), "groupmax": ("groupmax", {}), "abstopk": ("abstopk", {}),
    "transcoder, topk": ("topk", {"kind": "transcoder", "subtract_b_dec": False}), "transcoder, relu": ("relu", {"kind": "transcoder", "subtract_b_dec": False}),
}  # fmt: skip
SAYS = {
    "saelens": {name for name in ARCHITECTURES if name not in ("groupmax", "transcoder, topk")},
    "sparsify": {"topk", "topk, b_dec not subtracted", "groupmax", "transcoder, topk"},
    "dictionary_learning": {name for name in ARCHITECTURES if not name.startswith(("transcoder", "groupmax", "abstopk"))},
}
"""Which format can express which; the rest must be refused with a reason."""


@pytest.fixture(scope="module")
def invoke():
    """Exporters' methods in workers, one a library, that live as long as the module."""
    with Components() as components:
        remotes: dict = {}

        def call(registered, config, method, **kwargs):
            if registered.address not in remotes:
                remotes[registered.address] = components.make(registered, config)
            return getattr(remotes[registered.address], method)(**kwargs)

        yield call


def source(folder: Path, name: str, toy, format: str, dtype: torch.dtype = torch.float32) -> Path:
    """The SAE in `format`, without what saehub writes beside: as if the library had made it."""
    architecture, config = ARCHITECTURES[name]
    codec(format)[1].write(toy(architecture, dtype=dtype, **config), folder)
    if format == "saelens":
        cfg = json.loads((folder / "cfg.json").read_text())
        del cfg["metadata"]["saehub"]
        (folder / "cfg.json").write_text(json.dumps(cfg))
    elif format == "dictionary_learning":
        config = json.loads((folder / "config.json").read_text())
        del config["saehub"]
        (folder / "config.json").write_text(json.dumps(config))
    else:
        from safetensors.torch import load_file, save_file

        save_file(load_file(folder / "sae.safetensors"), folder / "sae.safetensors")
    return folder


CASES = [(a, b, name) for a in FORMATS for b in FORMATS if a != b for name in ARCHITECTURES if name in SAYS[a]]


@pytest.mark.parametrize(("a", "b", "name"), CASES)
def test_every_pair(toy, tmp_path, invoke, a, b, name):
    """Certified by both libraries where b can say it, and back to a bit-exactly unless something was folded; refused with a reason where not."""
    path = source(tmp_path / "a", name, toy, a)
    sae = load(path)
    if name not in SAYS[b]:
        with pytest.raises(Refused) as refusal:
            convert(path, tmp_path / "b", b, invoke=invoke)
        assert refusal.value.why and "formats that can: saehub" in refusal.value.fix and not (tmp_path / "b").exists()
        return
    there = convert(path, tmp_path / "b", b, invoke=invoke)
    assert there.outcome == "verified by the target's library" and there.support["unexplained"] == 0, str(there)
    assert there.active_share >= 0.9 and there.latents_exercised > 0.3
    back = convert(tmp_path / "b", tmp_path / "c", a, invoke=invoke)
    assert back.passed, str(back)
    if not there.folded:
        assert not there.changed and not back.changed and same(load(tmp_path / "c"), sae)


def same(a: SAE, b: SAE) -> bool:
    ours, others = a.tensors(), b.tensors()
    return a.config == b.config and all(ours[n].dtype == others[n].dtype and torch.equal(ours[n], others[n]) for n in ours)


@pytest.mark.parametrize(("a", "b"), [("sparsify", "saelens"), ("saelens", "dictionary_learning"), ("dictionary_learning", "sparsify")])
def test_half_precision_survives(toy, tmp_path, invoke, a, b):
    path = source(tmp_path / "a", "topk", toy, a, torch.bfloat16)
    certificate = convert(path, tmp_path / "b", b, invoke=invoke)
    assert certificate.passed and not certificate.changed and certificate.low_precision["dtype"] == "bfloat16"
    assert {t.dtype for t in load(tmp_path / "b").tensors().values()} == {torch.bfloat16}


def test_the_original_kept_beside_is_an_exact_way_back(toy, tmp_path, invoke):
    """A fold rounds; --keep-original undoes it."""
    path = source(tmp_path / "a", "jumprelu", toy, "saelens")
    certificate = convert(path, tmp_path / "b", "dictionary_learning", keep_original=True, invoke=invoke)
    assert certificate.changed == ["b_enc"] and certificate.exact_way_back
    convert(tmp_path / "b", tmp_path / "c", "saelens", invoke=invoke)
    assert same(load(tmp_path / "c"), load(path))


def test_certified_in_workers_of_its_own(toy, tmp_path):
    """As the command line does it: one worker a library, started for the one call."""
    certificate = convert(source(tmp_path / "a", "topk", toy, "sparsify"), tmp_path / "b", "dictionary_learning")
    assert (
        certificate.passed
        and not certificate.changed
        and {"eai-sparsify", "dictionary-learning"} <= set(certificate.source["versions"]) | set(certificate.target["versions"])
    )
