"""Rows, targets and a rule that selects latents in; the loss and the exact gradient of every parameter out, by hand and sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from saehub_native.architectures import StepResult
from saehub_native.architectures.auxk import add_auxk, add_bias_push
from saehub_native.architectures.base import Base

if TYPE_CHECKING:
    from saehub_native.config import SparseConfig
    from saehub_native.kernels import Rule


class Sparse(Base):
    """Every architecture that selects about k latents a row; a subclass says which.

    Loss, on B rows, with V the variance of the calibration targets:
        L = Σ|x̂ − y|² / (B V) + α L_aux + L_push     (the first term is FVU, but for the batch's own variance; the others: auxk.py)
    Gradients, with e = y − x̂, G = −2e / (B V), δ_bj = ⟨G_b, W_dec[i_bj]⟩·[v_bj ≠ 0] for the selected (value v, latent i) pairs:
        ∂W_dec[f] = Σ_{i_bj = f} v_bj G_b        ∂W_enc[f] = Σ_{i_bj = f} δ_bj x'_b        ∂b_enc[f] = Σ_{i_bj = f} δ_bj
    and b_dec, W_skip as in `Base.outer_gradients`.
    """

    config: SparseConfig
    rule: ClassVar[Rule] = "top"
    """How `encode_select` chooses."""
    static = True
    """Whether every step has the same shapes."""

    def k(self, step: int | None) -> int:
        """k, or on the way down to it: k_start + (k − k_start) · step / (k_anneal · steps), rounded."""
        config, job = self.config, self.job
        span = config.k_anneal * job.steps
        if step is None or step >= span:
            return config.k
        start = config.first_k(job)
        return round(start + (config.k - start) * step / span)

    def select(self, params: Mapping[str, Tensor], centred_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values [B, K] and latents int64 [B, K]; a value of 0 is not active."""
        return self.kernels.encode_select(centred_BD, params["W_enc"], params["b_enc"], k, self.rule)

    def first_choice(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> tuple[Tensor, Tensor]:
        return self.select({"W_enc": W_enc_FD, "b_enc": b_enc_F}, x_ND, self.config.k)

    def gradients(self, params: Mapping[str, Tensor], x_BD: Tensor, y_BD: Tensor, dead_F: Tensor, step: int | None = None) -> StepResult:
        config, n_rows, k = self.config, x_BD.shape[0], self.k(step)
        centred_BD = self.centred(params, x_BD, self.kernels.room("centred", x_BD.shape))
        k_aux, signed = config.aux_latents(self.job), self.rule == "abs"
        if config.auxk_alpha > 0:
            self.kernels.expect_auxk(params, centred_BD, dead_F, k_aux, signed)
        values_BK, indices_BK = self.select(params, centred_BD, k)
        target_BD = self.unexplained(params, x_BD, y_BD, self.kernels.room("target", y_BD.shape))
        weight = 1.0 / (n_rows * self.constants["variance"])
        grads, loss, residual_BD, grad_BD, squared_error = self.reconstruction(params, centred_BD, target_BD, values_BK, indices_BK, weight)
        loss = loss + add_auxk(
            grads, params, centred_BD, residual_BD, dead_F, k_aux=k_aux, alpha=config.auxk_alpha, signed=signed, kernels=self.kernels
        )
        self.outer_gradients(grads, params, grads["b_enc"], grad_BD, x_BD)
        loss = loss + add_bias_push(grads, params, dead_F, config.revive)

        alive_BK = values_BK != 0
        n_latents = params["b_enc"].shape[0]
        if self.kernels.name == "gpu":
            fired_F = self.kernels.fired(indices_BK, alive_BK, n_latents)
        else:
            fired_F = torch.zeros(n_latents, dtype=torch.bool, device=x_BD.device)
            fired_F[indices_BK[alive_BK]] = True
        extra = {"k": float(k)} if config.k_anneal else {}
        return StepResult(grads, loss, squared_error, alive_BK.sum() / n_rows, fired_F, residual_BD, extra)

    def reconstruction(
        self, params: Mapping[str, Tensor], centred_BD: Tensor, target_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, weight: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
        """The first term of the loss: gradients of W_enc, b_enc and W_dec, the loss, the residual (in place of the target), G, and Σ|e|²."""
        residual_BD, grad_BD, delta_BK, squared_error = self.kernels.reconstruct(target_BD, values_BK, indices_BK, params["W_dec"], weight)
        grads = self.pair_gradients(centred_BD, grad_BD, values_BK, indices_BK, delta_BK, params["W_dec"].shape[0])
        return grads, squared_error * weight, residual_BD, grad_BD, squared_error

    def pair_gradients(
        self, centred_BD: Tensor, grad_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, delta_BK: Tensor, n_latents: int
    ) -> dict[str, Tensor]:
        """W_enc, b_enc and W_dec of `n_latents` latents, from the pairs and G."""
        firing = self.kernels.group(indices_BK, n_latents, values_BK)
        ones_B1 = centred_BD.new_ones(centred_BD.shape[0], 1)
        return {
            "W_enc": self.kernels.latent_sums(firing, delta_BK, centred_BD),
            "b_enc": self.kernels.latent_sums(firing, delta_BK, ones_B1).squeeze(1),
            "W_dec": self.kernels.latent_sums(firing, values_BK, grad_BD),
        }

    def extra_params(self) -> dict[str, Any]:
        return {"k": self.config.k}
