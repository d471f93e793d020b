"""What the native trainers leave in; proof by SAELens' own code (Sparsify's for group-max) that the converted dictionary is the same, out."""

from __future__ import annotations

import os

import pytest
import torch

from saehub.api import Job
from saehub.checkpoint.certificate import BY_LIBRARY
from saehub.checkpoint.convert import convert
from saehub.checkpoint.format import save
from saehub.checkpoint.probe import make_probe
from saehub.pipeline.components import Components
from saehub.plugins import catalog
from saehub_native import TRAINERS
from saehub_native.train import NativeTrainer

D, F, BATCH, STEPS = 16, 64, 128, 40
KINDS = ("autoencoder", "transcoder", "skip_transcoder")
NO_CLASS = {(name, kind) for name in ("topk", "abstopk", "gated") for kind in KINDS[1:]} | {("groupmax", kind) for kind in KINDS}
"""What SAELens has no class for."""
BY_SPARSIFY = {("groupmax", kind) for kind in KINDS} | {("topk", kind) for kind in KINDS[1:]}
"""Of these, what Sparsify has one for."""


@pytest.fixture(scope="module")
def components():
    """One worker a library for the whole file: each is imported once."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with Components() as made:
        yield made


def rows(n: int, seed: int) -> torch.Tensor:
    """Sparse combinations of 40 directions, a mean and some noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    codes = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.25)
    return codes @ directions + 0.05 * torch.randn(n, D, generator=g) + 0.2


def answer(x_ND: torch.Tensor) -> torch.Tensor:
    """A transcoder's targets: a layer of a network."""
    return (x_ND @ torch.randn(D, D, generator=torch.Generator().manual_seed(6))).relu()


def trained(name: str, kind: str, folder):
    """A short training, saved with its golden probe."""
    config_class = catalog().find("trainer", f"native/{name}").load_config()
    steering = {"target_l0": 24.0} if hasattr(config_class, "target_l0") else {"k": 16}
    config = config_class(width=F, batch=BATCH, calibration=512, skip=kind == "skip_transcoder", **steering)
    target = None if kind == "autoencoder" else "mlp_out.1"
    job = Job(f"{name}-{kind}", "mlp_in.1" if target else "resid_post.1", target, D, D, STEPS, BATCH, STEPS * BATCH, seed=0)
    x_ND = rows(STEPS * BATCH, 1)
    y_ND = answer(x_ND)
    session = NativeTrainer(config).open(job, lambda n: (x_ND[:n], y_ND[:n] if target else None))
    for step in range(STEPS):
        part = slice(step * BATCH, (step + 1) * BATCH)
        session.step(x_ND[part], y_ND[part] if target else None)
    sae = session.finish()
    assert sae.config.kind == kind
    sae.provenance |= {"site": job.site, "target_site": job.target_site}
    # Many rows of the probe: those that a certificate makes up by itself resemble a transcoder's inputs little.
    held_ND = rows(2048, 3)
    probe = make_probe(sae, held_ND, None, None, None, target_ND=answer(held_ND) if target else None)
    save(sae, folder, probe=probe)
    return sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, *_ in TRAINERS])
def test_what_was_trained_is_the_same_dictionary_in_saelens(name, kind, components, tmp_path):
    sae = trained(name, kind, tmp_path / "sae")

    def invoke(registered, config, method, **arguments):
        return getattr(components.make(registered, config), method)(**arguments)

    target = "saelens/saelens"
    if (name, kind) in NO_CLASS:
        assert catalog().find("exporter", target).load()(None).refusal(sae), "SAELens has a class for it after all"
        if (name, kind) not in BY_SPARSIFY:
            return
        target = "sparsify/sparsify"
    certificate = convert(tmp_path / "sae", tmp_path / "out", target, invoke=invoke)
    assert certificate.outcome == BY_LIBRARY, (certificate.outcome, certificate.reason)
