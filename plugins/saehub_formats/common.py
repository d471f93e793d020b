"""What the exporters here share: a refusal to write, names of tensors as sites, and products in float64 for the published equations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import ModelShape
from saehub.checkpoint.foreign import RESTORE
from saehub.errors import CheckFailed, FormatError, SaehubError
from saehub.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.sae import SAE

PIECE = 2**22
"""Elements of a weight that are held in float64 at a time."""


class ReadOnly:
    """An exporter of a layout that nobody writes but its publisher."""

    publication = ""
    """Whose layout it is, for the refusal."""

    def __init__(self, config: Any = None):
        self.config = config

    def refusal(self, sae: SAE) -> str | None:
        """Always: the layout is only read."""
        return f"saehub reads {self.publication} and does not write it"

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """CheckFailed, always."""
        raise CheckFailed(f"{path} was not written", why=self.refusal(sae), fix="--to saehub, saelens, circuit_tracer or gemma_scope")


def build(file: Path, config: SAEConfig, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> SAE:
    """`SAE.build`, whose errors name the file."""
    from saehub.checkpoint.sae import SAE

    try:
        return SAE.build(config, tensors, provenance)
    except FormatError as error:
        raise FormatError(f"{file}: {error.what}", where=error.where, why=error.why, fix=error.fix or RESTORE) from error


def shape_of_family(family: str) -> ModelShape:
    """A shape that serves to translate names: any layer, no sizes."""
    return ModelShape(family, n_layers=10**6, d_model=1, d_mlp=1, n_heads=1, d_head=1, vocab=1, context=1)


def sites(site: str | None, target: str | None = None, family: str = "other") -> dict[str, str]:
    """`site` and `target_site` for the publisher's names; what is not in the table goes to `unknown_site` verbatim."""
    found = {}
    for key, name in (("site", site), ("target_site", target)):
        if not name:
            continue
        try:
            found[key] = str(Site.from_foreign(name, shape_of_family(family)))
        except SaehubError:
            found[f"unknown_{key}"] = name
    return found


def multiply(x_ND: Tensor, W_DF: Tensor) -> Tensor:
    """x W in float64; the weight is widened some columns at a time."""
    import torch

    columns = max(1, PIECE // max(1, W_DF.shape[0]))
    x_ND = x_ND.double()
    return torch.cat([x_ND @ W_DF[:, start : start + columns].double() for start in range(0, W_DF.shape[1], columns)], dim=1)


def combine(f_NF: Tensor, W_FD: Tensor) -> Tensor:
    """f W in float64; the weight is widened some rows at a time."""
    import torch

    rows = max(1, PIECE // max(1, W_FD.shape[1]))
    y_ND = torch.zeros(f_NF.shape[0], W_FD.shape[1], dtype=torch.float64)
    for start in range(0, W_FD.shape[0], rows):
        y_ND += f_NF[:, start : start + rows] @ W_FD[start : start + rows].double()
    return y_ND


def keep_largest(p_NF: Tensor, k: int, ranked_NF: Tensor | None = None) -> Tensor:
    """max(p, 0) at each row's k largest of `ranked` (default p), 0 elsewhere."""
    import torch

    chosen_NK = (p_NF if ranked_NF is None else ranked_NF).topk(k, dim=-1).indices
    return torch.zeros_like(p_NF).scatter(-1, chosen_NK, p_NF.gather(-1, chosen_NK).clamp(min=0))
