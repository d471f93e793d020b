"""With the embedded language model: a site is proved or refuted by name alone, and real activations certify a conversion."""

from __future__ import annotations

import pytest
import torch

from saehub.activations.taps import read
from saehub.api import ModelSpec
from saehub.checkpoint import format as v1
from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.convert import convert
from saehub.checkpoint.probe import make_probe
from saehub.checkpoint.sae import SAE
from saehub.checkpoint.verify import verify
from saehub.data.model import ModelHandle
from saehub.sites import Site


@pytest.fixture(scope="module")
def model():
    return ModelHandle.load(ModelSpec("builtin/tiny-llama"))


def checkpoint(model, folder, *, reads: str, claims: str):
    """A TopK SAE on rows of the site `reads`, whose header claims `claims`."""
    ids = model.tokenizer("def read(path):\n    '''Return the text of a file.'''\n" * 40, add_special_tokens=False)["input_ids"]
    contexts = torch.tensor(ids[: 8 * 32]).reshape(8, 32)
    x_BTD = read(model.hf, contexts, {"x": Site.parse(reads).tap(model.shape)})["x"]
    which, position = torch.arange(80) % 8, 2 + torch.arange(80) // 8 * 3
    x_ND = x_BTD[which, position]
    draw = torch.Generator().manual_seed(0)
    directions_FD = torch.nn.functional.normalize(torch.randn(256, x_ND.shape[1], generator=draw), dim=1)
    tensors = {"W_enc": directions_FD.T.contiguous(), "b_enc": torch.zeros(256), "W_dec": directions_FD, "b_dec": x_ND.mean(0)}
    about = {"name": "builtin/tiny-llama", "dtype": "float32", "attention": "sdpa", "fingerprint": model.fingerprint}
    sae = SAE.build(SAEConfig("topk", x_ND.shape[1], 256, params={"k": 16}), tensors, {"site": claims, "model": about})
    return v1.save(sae, folder, probe=make_probe(sae, x_ND, contexts[which, position], position, contexts[which]))


@pytest.mark.parametrize(
    ("reads", "claims", "good"),
    [
        ("resid_post.1", "resid_post.1", True),
        ("resid_post.1", "resid_post.2", False),
        ("mlp_out.1", "attn_out.1", False),
        ("attn_z.0", "attn_z.0", True),
    ],
)
def test_the_site_by_the_models_name(model, tmp_path, reads, claims, good):
    report = verify(checkpoint(model, tmp_path / "sae", reads=reads, claims=claims), "builtin/tiny-llama")
    site = next(check for check in report.checks if check.name == "site")
    assert report.ok == good and site.status == ("ok" if good else "failed")
    assert good or f"the rows are those of {reads}" in site.detail


def test_real_activations_in_a_certificate(model, tmp_path):
    folder = checkpoint(model, tmp_path / "sae", reads="resid_post.1", claims="resid_post.1")
    certificate = convert(folder, tmp_path / "copy", "saehub", model=model)
    assert certificate.passed and "80 of the golden probe, 256 activations of builtin/tiny-llama" in certificate.inputs
    assert verify(tmp_path / "copy", model).ok
    (folder / "probe.safetensors").unlink()
    bare = v1.save(v1.load(folder, check_hashes=True), tmp_path / "bare")
    convert(
        bare, tmp_path / "probed", "saehub", model=model
    )  # real rows become a probe, but prove no site: they were taken where it claims
    report = {check.name: check.status for check in verify(tmp_path / "probed", model).checks}
    assert report["probe replay"] == "ok" and report["site"] == "inconclusive"
