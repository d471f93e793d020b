"""Small SAEs of every architecture, with tensors from a seed."""

from __future__ import annotations

import pytest
import torch

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE

D, F = 12, 40
PARAMS = {
    "topk": {"k": 5},
    "abstopk": {"k": 5},
    "groupmax": {"k": 5},
    "batchtopk": {"k": 5.5},
    "matryoshka": {"k": 5},
    "matching_pursuit": {"residual_threshold": 0.3, "max_iterations": 6, "stop_on_duplicate_support": True},
}
ARCHITECTURES = ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "gated", "groupmax", "matching_pursuit")


def build(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, d_out: int = D, provenance: dict | None = None, **config
) -> SAE:
    """A random SAE whose rows activate a few latents; `config` overrides fields of SAEConfig."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    tensors = {"W_enc": normal(D, F), "b_enc": normal(F) * 0.3 - 0.5, "W_dec": normal(F, d_out) / D**0.5, "b_dec": normal(d_out) * 0.3}
    tensors |= {
        "threshold": normal(F).abs() + 1.0,
        "b_gate": normal(F) - 2,
        "b_mag": normal(F) - 1,
        "r_mag": normal(F) * 0.3,
        "W_skip": normal(d_out, D),
    }
    if architecture in ("batchtopk", "matryoshka"):
        tensors["threshold"] = torch.tensor(2.5)
    tensors["group_sizes"] = torch.tensor([8, 12, 20])
    made = SAEConfig(architecture, D, F, d_out=d_out, params=PARAMS.get(architecture, {}), **config)
    from saehub.checkpoint.registry import architecture as find

    names = find(architecture).specs(made)
    return SAE.build(made, {n: tensors[n].to(dtype) if tensors[n].is_floating_point() else tensors[n] for n in names}, provenance)


@pytest.fixture
def toy():
    """`toy("topk", dtype=…, kind=…, norm_in=…)`."""
    return build


@pytest.fixture
def rows() -> torch.Tensor:
    """Float32 [96, D]."""
    return torch.randn(96, D, generator=torch.Generator().manual_seed(99))
