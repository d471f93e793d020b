"""Matryoshka BatchTopK: rows and parameters in; the pairs of BatchTopK, and a loss in which every prefix of latents reconstructs by itself, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub_native.architectures.batchtopk import BatchTopK
from saehub_native.kernels.lazy import joined

if TYPE_CHECKING:
    from saehub_native.config import MatryoshkaConfig


class Matryoshka(BatchTopK):
    """f as BatchTopK over all latents; the prefix of the first n_g latents gives x̂_g = f[:n_g] W_dec[:n_g] + b_dec (Bussmann et al. 2025,
    arXiv 2503.17547). In place of the first term of the loss stands its mean over the G prefixes:

        L = 1/G Σ_g Σ|x̂_g − y|² / (B V) + α L_aux + L_push     (L_aux on the residual of the whole dictionary)

    With e_g = y − x̂_g and G_g = −2 e_g / (G B V), a latent of group j (in the prefixes j … G) sees C_j = Σ_{g ≥ j} G_g in place of G:
        ∂W_dec[f] = Σ v_bj C_b        δ_bj = ⟨C_b, W_dec[i_bj]⟩·[v_bj ≠ 0]        ∂b_dec = Σ_b C_1b − ∂b_encᵀ W_enc
    """

    config: MatryoshkaConfig

    def blocks(self) -> list[tuple[int, int]]:
        """First and last + 1 latent of each group."""
        ends = self.config.prefix_ends(self.job)
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def reconstruction(
        self, params: Mapping[str, Tensor], centred_BD: Tensor, target_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, weight: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
        W_dec_FD, blocks = params["W_dec"], self.blocks()
        pairs = list(_by_block(values_BK, indices_BK, blocks))
        weight /= len(blocks)
        residual_BD, loss, grads_g = target_BD, target_BD.new_zeros(()), []
        for (first, end), (values_BJ, indices_BJ) in zip(blocks, pairs, strict=True):
            residual_BD = residual_BD - self.kernels.decode(values_BJ, indices_BJ, W_dec_FD[first:end])
            loss += residual_BD.square().sum() * weight
            grads_g.append(residual_BD * (-2 * weight))
        for g in range(len(blocks) - 2, -1, -1):  # C_g, from the last group to the first
            grads_g[g] += grads_g[g + 1]
        parts = []
        for (first, end), (values_BJ, indices_BJ), grad_BD in zip(blocks, pairs, grads_g, strict=True):
            # A selected value of 0 is held there by the ReLU (or pads a row): no gradient.
            delta_BJ = self.kernels.value_gradients(grad_BD, indices_BJ, W_dec_FD[first:end]).mul_(values_BJ != 0)
            parts.append(self.pair_gradients(centred_BD, grad_BD, values_BJ, indices_BJ, delta_BJ, end - first))
        grads = {name: joined([part[name] for part in parts]) for name in ("W_enc", "b_enc", "W_dec")}
        return grads, loss, residual_BD, grads_g[0], residual_BD.square().sum()

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = super().export(params, x_ND)
        return fields, tensors | {"group_sizes": torch.tensor([end - first for first, end in self.blocks()])}


def _by_block(values_BK: Tensor, indices_BK: Tensor, blocks: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The active pairs of each block of latents: values [B, J] and indices within the block, J the count of the fullest row, zeros for the rest."""
    rows_B1 = torch.arange(values_BK.shape[0], device=values_BK.device).unsqueeze(1)
    for first, end in blocks:
        inside_BK = (indices_BK >= first) & (indices_BK < end) & (values_BK != 0)
        width = max(1, int(inside_BK.sum(1).max()))
        order_BJ = torch.sort(inside_BK.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :width]
        inside_BJ = inside_BK.gather(1, order_BJ)
        # Places left over point at latents spread over the block, with value 0.
        indices_BJ = torch.where(inside_BJ, indices_BK.gather(1, order_BJ) - first, rows_B1 % (end - first))
        yield values_BK.gather(1, order_BJ) * inside_BJ, indices_BJ
