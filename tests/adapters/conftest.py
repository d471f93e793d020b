"""Small SAEs for the adapters' tests: tensors from a seed, any architecture and kind."""

from __future__ import annotations

import pytest
import torch

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.registry import architecture as find
from saehub.checkpoint.sae import SAE

D, F = 16, 48
PARAMS = {
    "topk": {"k": 6},
    "abstopk": {"k": 6},
    "groupmax": {"k": 6},
    "batchtopk": {"k": 6.5},
    "matryoshka": {"k": 6},
    "matching_pursuit": {"residual_threshold": 0.25, "max_iterations": 7, "stop_on_duplicate_support": True},
}


def build(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, d_out: int = D, provenance: dict | None = None, **config
) -> SAE:
    """A random SAE that activates a few latents a row; `config` overrides fields of SAEConfig."""
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
    tensors["group_sizes"] = torch.tensor([8, 16, 24])
    made = SAEConfig(architecture, D, F, d_out=d_out, params=PARAMS.get(architecture, {}), **config)
    return SAE.build(
        made,
        {n: tensors[n].to(dtype) if tensors[n].is_floating_point() else tensors[n] for n in find(architecture).specs(made)},
        provenance,
    )


@pytest.fixture(scope="session")
def toy():
    """`toy("topk", dtype=…, kind=…, norm_in=…)`."""
    return build


@pytest.fixture
def rows() -> torch.Tensor:
    """Float32 [96, D]."""
    return torch.randn(96, D, generator=torch.Generator().manual_seed(99))
