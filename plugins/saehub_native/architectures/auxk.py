"""The residual of a batch and the set of dead latents in; the losses that revive them, and their gradients, encoder included, out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saehub_native.kernels import Kernels

CHUNK_BYTES = 32 << 20  # bytes of one [rows, dead latents] tensor


def add_auxk(
    grads: dict[str, Tensor],
    params: Mapping[str, Tensor],
    centred_BD: Tensor,
    residual_BD: Tensor,
    dead_F: Tensor,
    *,
    k_aux: int,
    alpha: float,
    signed: bool = False,
    kernels: Kernels | None = None,
) -> Tensor:
    """Add the gradients of AuxK to `grads` (W_enc, b_enc, W_dec; in place) and return α·L_aux.

    Dead latents try to reconstruct what the living ones missed (Gao et al. 2024, arXiv 2406.04093, §A.2):
        p = x' W_encᵀ + b_enc over dead latents,  a = relu(top-k_aux(p)),  ê = a W_dec,
        L_aux = Σ|ê − e|² / Σ|e − ē|²,  with the residual e = y − x̂ taken as a constant.
    With R = ê − e, G = 2αR / Σ|e − ē|² and δ = (G W_decᵀ)·[a > 0]:
        ∂W_dec = aᵀG,  ∂W_enc = δᵀx',  ∂b_enc = Σ_b δ_b.
    Over the dead latents only: as dense matrices in chunks of rows, or as `kernels` do it. `signed`: the k_aux largest by |p|, no ReLU, [a ≠ 0].
    """
    if alpha == 0:
        return residual_BD.new_zeros(())
    if kernels is not None:
        loss = kernels.add_auxk(grads, params, centred_BD, residual_BD, dead_F, k_aux, alpha, signed)
        if loss is not None:
            return loss
    dead_N = dead_F.nonzero().squeeze(1)
    n_dead = dead_N.numel()
    if n_dead == 0:
        return residual_BD.new_zeros(())
    W_enc_ND, b_enc_N, W_dec_ND = params["W_enc"][dead_N], params["b_enc"][dead_N], params["W_dec"][dead_N]
    spread = (residual_BD - residual_BD.mean(0)).square_().sum().clamp_min(torch.finfo(residual_BD.dtype).tiny)
    g_enc_ND, g_b_N, g_dec_ND = torch.zeros_like(W_enc_ND), torch.zeros_like(b_enc_N), torch.zeros_like(W_dec_ND)
    error = residual_BD.new_zeros(())
    chunk = max(64, CHUNK_BYTES // (4 * n_dead))
    for start in range(0, residual_BD.shape[0], chunk):
        x_cD, e_cD = centred_BD[start : start + chunk], residual_BD[start : start + chunk]
        acts_cN = torch.addmm(b_enc_N, x_cD, W_enc_ND.t())
        if n_dead > k_aux:
            indices_cK = torch.topk(acts_cN.abs() if signed else acts_cN, k_aux, dim=1, sorted=False).indices
            acts_cN = torch.zeros_like(acts_cN).scatter_(1, indices_cK, acts_cN.gather(1, indices_cK))
        if not signed:
            acts_cN.relu_()
        miss_cD = torch.addmm(e_cD, acts_cN, W_dec_ND, beta=-1)
        error += miss_cD.square().sum()
        grad_cD = miss_cD.mul_(2 * alpha / spread)
        delta_cN = torch.mm(grad_cD, W_dec_ND.t()).mul_(acts_cN != 0)
        g_dec_ND.addmm_(acts_cN.t(), grad_cD)
        g_enc_ND.addmm_(delta_cN.t(), x_cD)
        g_b_N += delta_cN.sum(0)
    # dead_N has no duplicates, so these indexed sums do not depend on an order.
    grads["W_enc"].index_add_(0, dead_N, g_enc_ND)
    grads["W_dec"].index_add_(0, dead_N, g_dec_ND)
    grads["b_enc"].index_add_(0, dead_N, g_b_N)
    return alpha * error / spread


def add_bias_push(grads: dict[str, Tensor], params: Mapping[str, Tensor], dead_F: Tensor, weight: float, bias: str = "b_enc") -> Tensor:
    """Add the gradient of L_push = −weight · Σ_{f dead} b_enc[f] to `grads` (b_enc, or another `bias`; in place) and return L_push.

    A dead latent below zero on every row of a batch has no gradient through AuxK's ReLU; this raises it until some row reaches it. The
    idea is the pre-activation loss of Anthropic's January 2025 update (transformer-circuits.pub), on the bias alone: b_dec, which moves
    pre-activations too, has no share in it.
    """
    grads[bias].sub_(dead_F.to(grads[bias].dtype), alpha=weight)
    return (params[bias] * dead_F).sum() * -weight
