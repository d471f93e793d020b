"""ReLU: rows and parameters in; all positive pre-activations out, kept few by an L1 (or Lp) penalty weighted by the decoder's norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehub_native.architectures.dense import Batch, Dense

if TYPE_CHECKING:
    from saehub_native.config_dense import ReLUConfig

SMOOTH = 1e-2  # keeps the slope of u^p finite at 0, where p < 1 would make it infinite


class ReLU(Dense):
    """f = relu(p). The decoder is free, and the penalty sees what an activation does to the output (Conerly et al., Anthropic, April 2024):

        u_bi = f_bi ‖w_i‖ / √V,     penalty = r/B Σ_bi φ(u_bi),     φ(u) = (u + s)^p − s^p,  s = 0.01
        ∂/∂f_bi = (G W_decᵀ)_bi + λ r/B φ'(u_bi) ‖w_i‖ / √V         ∂W_dec[i] = Σ_b f_bi G_b + λ r/B Σ_b φ'(u_bi) f_bi / √V · w_i / ‖w_i‖

    p is 1, and falls linearly to `p_end` over the last `p_anneal` of the steps (Karvonen et al. 2024, arXiv 2408.00113); r, a constant in the
    gradient, is Σu / Σφ(u) of the batch before, so that the penalty keeps its size while its shape changes.
    """

    config: ReLUConfig
    unit_decoder = False

    def p(self, step: int | None) -> float:
        """The exponent of a step."""
        config, steps = self.config, self.job.steps
        if not config.p_anneal:
            return 1.0
        if step is None:
            return config.p_end
        return 1 - (1 - config.p_end) * max(0.0, min(1.0, (step + 1 - (1 - config.p_anneal) * steps) / (config.p_anneal * steps)))

    def chunk(self, params: Mapping[str, Tensor], x_cD: Tensor, residual_cD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        W_enc_FD, W_dec_FD, grads, p = params["W_enc"], params["W_dec"], batch.grads, self.p(batch.step)
        acts_cF = torch.addmm(params["b_enc"], x_cD, W_enc_FD.t()).relu_()
        residual_cD.addmm_(acts_cF, W_dec_FD, alpha=-1)
        grad_cD = residual_cD * (-2 * batch.weight)
        norms_F = W_dec_FD.norm(dim=1)
        scale = batch.coefficient * self.constants.get("ratio", 1.0) / batch.n_rows
        sizes_cF = acts_cF * (norms_F / batch.unit)
        if p == 1:
            batch.penalty += scale * sizes_cF.sum()
            slope_cF = (acts_cF > 0) * (scale / batch.unit)
        else:
            shaped = (sizes_cF + SMOOTH).pow_(p).sub_(SMOOTH**p).sum()
            batch.penalty += scale * shaped
            for name, total in (("plain", sizes_cF.sum()), ("shaped", shaped)):
                batch.sums[name] = batch.sums.get(name, 0) + total
            slope_cF = (sizes_cF + SMOOTH).pow_(p - 1).mul_(acts_cF > 0).mul_(scale / batch.unit * p)
        delta_cF = torch.mm(grad_cD, W_dec_FD.t()).mul_(acts_cF > 0).addcmul_(slope_cF, norms_F)
        grads["W_dec"].addmm_(acts_cF.t(), grad_cD).addcmul_((slope_cF * acts_cF).sum(0).div_(norms_F.clamp_min(1e-12)).unsqueeze(1), W_dec_FD)
        grads["W_enc"].addmm_(delta_cF.t(), x_cD)
        grads["b_enc"] += delta_cF.sum(0)
        return acts_cF, grad_cD

    def close(self, params: Mapping[str, Tensor], batch: Batch, l0: Tensor) -> None:
        if batch.sums and batch.step is not None:
            self.constants["ratio"] = float(batch.sums["plain"] / batch.sums["shaped"].clamp_min(1e-12))
