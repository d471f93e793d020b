"""JumpReLU: rows and parameters in; pre-activations above a threshold of their latent's own out, trained with straight-through estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub_native.architectures.dense import Batch, Dense

if TYPE_CHECKING:
    from saehub_native.config_dense import JumpReLUConfig


class JumpReLU(Dense):
    """f = z·[z > θ],  z = x' W_encᵀ + b_enc,  θ = exp(t) > 0, one a latent. With K = [|z − θ| < ε/2] and ε = bandwidth · √V the pseudo-derivatives
    are those of a rectangle of width ε (Rajamanoharan et al. 2024, arXiv 2407.14435, eqs. 11 and 12):

        ∂f/∂z = [z > θ],     ∂f/∂θ = −(θ/ε) K,     ∂[z > θ]/∂θ = −(1/ε) K,     ∂θ/∂t = θ

    `penalty: l0` (that paper):  (L0/target − 1)², or L0 without a target; L0 is the batch's mean, and its gradient moves thresholds only.
    `penalty: tanh` (Anthropic, January 2025, transformer-circuits.pub):  1/B Σ_bi tanh(c f_bi / √V), whose gradient reaches the encoder through f
    as well; so does the rectangle, as f depends on z − θ: ∂f/∂z = [z > θ] + (θ/ε) K. And `preact` · 1/B Σ_bi relu(θ_i − z_bi) / √V, which pulls
    latents that never fire towards their threshold. Decoder rows have unit norm.

    At the end all θ are multiplied by one number.
    """

    config: JumpReLUConfig
    FIRST = None

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.steered = self.config.penalty == "tanh"

    def init(self, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """θ starts where the mean L0 of the calibration rows is `first_l0`."""
        params = super().init(x_ND, y_ND, generator)
        theta = self.cutoff(params, x_ND, self.config.first_l0(self.job))[2]
        return params | {"log_threshold": torch.full_like(params["b_enc"], float(theta.log()))}

    def chunk(self, params: Mapping[str, Tensor], x_cD: Tensor, residual_cD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        config, grads, W_enc_FD, W_dec_FD = self.config, batch.grads, params["W_enc"], params["W_dec"]
        theta_F, width = params["log_threshold"].exp(), config.bandwidth * batch.unit
        z_cF = torch.addmm(params["b_enc"], x_cD, W_enc_FD.t())
        on_cF = z_cF > theta_F
        acts_cF = z_cF * on_cF
        residual_cD.addmm_(acts_cF, W_dec_FD, alpha=-1)
        grad_cD = residual_cD * (-2 * batch.weight)
        slope_cF = torch.mm(grad_cD, W_dec_FD.t())  # ∂L/∂f
        if config.penalty == "tanh":
            shaped_cF = torch.tanh(acts_cF * (config.tanh_scale / batch.unit))
            batch.penalty += batch.coefficient / batch.n_rows * shaped_cF.sum()
            slope_cF.add_(1 - shaped_cF.square_(), alpha=batch.coefficient * config.tanh_scale / batch.unit / batch.n_rows)
        window_cF = (z_cF - theta_F).abs_() < width / 2
        pull_cF = (slope_cF * window_cF).mul_(theta_F / width)
        if config.penalty == "l0":
            batch.sums["window"] = batch.sums.get("window", 0) + window_cF.sum(0)
        delta_cF = slope_cF.mul_(on_cF)
        grads["log_threshold"].sub_(pull_cF.sum(0).mul_(theta_F))
        if config.penalty == "tanh":
            delta_cF += pull_cF
        if config.penalty == "tanh" and config.preact:
            size = config.preact / batch.unit / batch.n_rows
            short_cF = (theta_F - z_cF).relu_()
            batch.penalty += size * short_cF.sum()
            below_cF = (short_cF > 0).to(z_cF)
            delta_cF.sub_(below_cF, alpha=size)
            grads["log_threshold"].add_(below_cF.sum(0) * theta_F, alpha=size)
        grads["W_dec"].addmm_(acts_cF.t(), grad_cD)
        grads["W_enc"].addmm_(delta_cF.t(), x_cD)
        grads["b_enc"] += delta_cF.sum(0)
        return acts_cF, grad_cD

    def close(self, params: Mapping[str, Tensor], batch: Batch, l0: Tensor) -> None:
        if self.config.penalty != "l0":
            return
        target = self.config.target_l0
        if target is None:
            batch.penalty += batch.coefficient * l0
            slope = batch.coefficient
        else:
            batch.penalty += batch.coefficient * (l0 / target - 1).square()
            slope = batch.coefficient * 2 * (l0 / target - 1) / target  # ∂penalty/∂L0
        width = self.config.bandwidth * batch.unit
        batch.grads["log_threshold"] -= params["log_threshold"].exp() * batch.sums["window"] * (slope / (width * batch.n_rows))

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = super().export(params)
        theta_F = params["log_threshold"].exp()
        ratio = self.threshold(params, x_ND, params["W_enc"] / theta_F[:, None], params["b_enc"] / theta_F)
        return fields, tensors | {"threshold": theta_F * (1.0 if ratio is None else ratio)}

    def read(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        params = super().read(config, tensors)
        norms_F = tensors["W_dec"].detach().float().norm(dim=1).clamp_min(1e-12)
        return params | {"log_threshold": (tensors["threshold"].detach().float() * norms_F).clamp_min(1e-6).log()}
