"""Gated: rows and parameters in; activations whose support and size are decided apart, out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub_native.architectures.dense import Batch, Dense

if TYPE_CHECKING:
    from saehub_native.config_dense import GatedConfig


class Gated(Dense):
    """q = x' W_encᵀ,  π = q + b_gate,  m = q e^{r_mag} + b_mag,  f = [π > 0]·relu(m)   (Rajamanoharan et al. 2024, arXiv 2404.16014).

    penalty = 1/B Σ_bi relu(π_bi) / √V, and one more term:  L_aux = Σ|relu(π) W_dec + b_dec − y|² / (B V), with W_dec, b_dec and W_skip taken as
    constants in it. With G of x̂, G' of the second reconstruction, and unit decoder rows:
        μ = (G W_decᵀ)·[π > 0]·[m > 0]      ∂b_mag = Σ_b μ_b      ∂r_mag = Σ_b μ_b q_b e^{r_mag}      ∂W_dec = fᵀ G
        γ = (G' W_decᵀ + λ/(B √V))·[π > 0]  ∂b_gate = Σ_b γ_b     ∂W_enc = (μ e^{r_mag} + γ)ᵀ x'
    """

    config: GatedConfig
    bias = "b_gate"

    def init(self, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Gate and magnitude start alike."""
        params = super().init(x_ND, y_ND, generator)
        bias_F = params.pop("b_enc")
        return params | {"b_gate": bias_F, "b_mag": bias_F.clone(), "r_mag": torch.zeros_like(bias_F)}

    def chunk(self, params: Mapping[str, Tensor], x_cD: Tensor, residual_cD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        grads, W_enc_FD, W_dec_FD, ratio_F = batch.grads, params["W_enc"], params["W_dec"], params["r_mag"].exp()
        q_cF = torch.mm(x_cD, W_enc_FD.t())
        gate_cF = (q_cF + params["b_gate"]).relu_()
        acts_cF = torch.addcmul(params["b_mag"], q_cF, ratio_F).relu_().mul_(gate_cF > 0)
        miss_cD = torch.addmm(residual_cD, gate_cF, W_dec_FD, alpha=-1)
        residual_cD.addmm_(acts_cF, W_dec_FD, alpha=-1)
        grad_cD = residual_cD * (-2 * batch.weight)

        rate = batch.coefficient / batch.unit / batch.n_rows
        batch.penalty += miss_cD.square().sum() * batch.weight + rate * gate_cF.sum()
        gamma_cF = torch.mm(miss_cD.mul_(-2 * batch.weight), W_dec_FD.t()).add_(rate).mul_(gate_cF > 0)
        grads["b_gate"] += gamma_cF.sum(0)
        mu_cF = torch.mm(grad_cD, W_dec_FD.t()).mul_(acts_cF > 0)
        grads["b_mag"] += mu_cF.sum(0)
        mu_cF *= ratio_F
        grads["r_mag"] += (mu_cF * q_cF).sum(0)
        delta_cF = gamma_cF.add_(mu_cF)
        grads["W_enc"].addmm_(delta_cF.t(), x_cD)
        grads["W_dec"].addmm_(acts_cF.t(), grad_cD)
        # b_dec acts on both paths through x'.
        batch.sums["delta"] = batch.sums.get("delta", 0) + delta_cF.sum(0)
        return acts_cF, grad_cD

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        params = self.settled(params, x_ND)
        fields, tensors = super().export(params)
        return fields, tensors | {name: params[name].clone() for name in ("b_gate", "b_mag", "r_mag")}

    def read(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norms_F = tensors["W_dec"].detach().float().norm(dim=1).clamp_min(1e-12)
        params = super().read(config, {**tensors, "b_enc": tensors["b_mag"]})
        del params["b_enc"]
        own = {name: tensors[name].detach().float() * norms_F for name in ("b_gate", "b_mag")}
        return params | own | {"r_mag": tensors["r_mag"].detach().float().clone()}
