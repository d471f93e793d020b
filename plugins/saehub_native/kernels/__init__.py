"""Rows, weights and k in; selected latents, reconstructions and sparse gradients out: the interface that every kernel set implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Rule = Literal["top", "abs", "group"]


@dataclass
class Firing:
    """The (row, latent) pairs of a selection, grouped by latent: what every sparse gradient sums over."""

    order_N: Tensor
    """int64 [B*K], position in the flattened `indices_BK` of the n-th pair, grouped by latent, rows ascending within one."""
    rows_N: Tensor
    """int64 [B*K], the row of that pair."""
    offsets_F: Tensor
    """int64 [F], where a latent's pairs begin."""
    counts_F: Tensor
    """int64 [F], how many pairs a latent has (pairs of value 0 included)."""


class Kernels(Protocol):
    """The operations of a sparse training step; weights of latents are rows: W_enc_FD and W_dec_FD, both [F, d] and contiguous.

    Every set of kernels gives the support of the float32 pre-activations and the gradients of dense autograd; which one is used depends on
    what the machine can do, never on timing, so that a resumed run takes the same path. All of them are deterministic, and none changes
    its inputs.
    """

    name: str
    """Recorded in a trainer's state."""

    def encode_select(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: Rule = "top") -> tuple[Tensor, Tensor]:
        """The k chosen pre-activations `p = x W_encᵀ + b_enc` of each row: float32 [B, K] and int64 [B, K], in no particular order.

        `top`: the k largest, through a ReLU. `abs`: the k largest by |p|, sign kept. `group`: the largest of each of k contiguous groups of
        F / k latents, through a ReLU.
        """
        ...

    def encode_select_batch(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k·B largest pre-activations of the whole batch, through a ReLU: float32 [B, K'] and int64 [B, K'], K' the count of the fullest row.

        A row's values descend; places that it does not fill hold zeros, at latents of its own that were not chosen.
        """
        ...

    def decode(self, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        """`x̂_b = Σ_j v_bj W_dec[i_bj]`, without a bias: [B, d]."""
        ...

    def value_gradients(self, grad_BD: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        """`∂L/∂v_bj = ⟨∂L/∂x̂_b, W_dec[i_bj]⟩`: [B, K]."""
        ...

    def group(self, indices_BK: Tensor, n_latents: int) -> Firing:
        """The pairs of a selection, grouped by latent."""
        ...

    def latent_sums(self, firing: Firing, weights_BK: Tensor, source_BD: Tensor) -> Tensor:
        """`S_f = Σ_{(b,j): i_bj = f} w_bj source_b`: [F, d], the shape of both weight gradients, without a [B, F] matrix."""
        ...


def pick(device: str, name: str | None = None) -> Kernels:
    """The kernels for `device`; `name` asks for the set that a saved state was trained with."""
    from saehub.errors import StageFailed
    from saehub_native.kernels.reference import ReferenceKernels

    if name not in (None, ReferenceKernels.name):
        raise StageFailed(
            f"this training was begun with the kernels {name!r}, which this version does not have",
            why=f"available on {device}: {ReferenceKernels.name}",
            fix="resume with the saehub version that wrote the state, or start the training again",
        )
    return ReferenceKernels()
