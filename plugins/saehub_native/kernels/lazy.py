"""Pairs of rows and latents in; a gradient of [F, d] that nothing has to hold whole out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from saehub_native.kernels import Firing
    from saehub_native.kernels.cpu import CpuKernels


@dataclass
class Part:
    """`S_f = Σ_{(b, j): i_bj = f} w_bj source_b` for the latents `first … first + n − 1` of a gradient."""

    firing: Firing
    weights_N: Tensor
    source_BD: Tensor
    n_latents: int


class RowSums:
    """The gradient of a weight with one row a latent, as sums over pairs and a few dense rows: what `Kernels.latent_sums` may return instead
    of a tensor, so that the optimizer can form, use and forget one row after another."""

    def __init__(self, kernels: CpuKernels, parts: Sequence[Part]):
        self.kernels, self.parts = kernels, list(parts)
        self.extra: tuple[Tensor, Tensor] | None = None
        self.sphere = False
        """Whether the weight's rows have norm 1: the component along a row is taken out of its gradient, the row renormalised after the step."""
        self.factor: float | Tensor = 1.0
        """What clipping multiplies it with."""
        self._slots_F: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.n_latents for part in self.parts), self.parts[0].source_BD.shape[1]

    def index_add_(self, dim: int, rows_N: Tensor, values_ND: Tensor) -> RowSums:
        """Dense rows for some latents (AuxK's); `rows_N` without duplicates."""
        if dim != 0 or self.extra is not None:
            raise ValueError("one set of dense rows can be added to a gradient, along its rows")
        self.extra = rows_N, values_ND.contiguous()
        return self

    def place_rows(self, slots_F: Tensor, values_ND: Tensor) -> None:
        """As `index_add_`, where only the device knows how many rows there are: `slots_F` as `slots_F()` returns it."""
        if self.extra is not None:
            raise ValueError("one set of dense rows can be added to a gradient, along its rows")
        self.extra, self._slots_F = (slots_F, values_ND), slots_F

    def slots_F(self) -> Tensor:
        """int32 [F]: which dense row belongs to a latent, or −1."""
        if self._slots_F is not None:
            return self._slots_F
        device = self.parts[0].source_BD.device
        slots_F = torch.full((self.shape[0],), -1, dtype=torch.int32, device=device)
        if self.extra is not None:
            slots_F[self.extra[0]] = torch.arange(self.extra[0].numel(), dtype=torch.int32, device=device)
        return slots_F

    def dense(self, weight_FD: Tensor | None = None) -> Tensor:
        """The [F, d] tensor; a projected gradient needs the weight it belongs to."""
        return self.kernels.dense_gradient(self, weight_FD)


def joined(parts: Sequence[Tensor | RowSums]) -> Tensor | RowSums:
    """Gradients of consecutive blocks of latents as one."""
    if isinstance(parts[0], RowSums):
        return RowSums(parts[0].kernels, [part for sums in parts for part in sums.parts])
    return torch.cat(list(parts))
