"""TopK: rows, targets and parameters in; the loss and the exact gradient of every parameter out, by hand and sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.errors import UsageError
from saehub_native.architectures import StepResult
from saehub_native.architectures.auxk import add_auxk, add_bias_push

if TYPE_CHECKING:
    from saehub.api import Job
    from saehub_native.config import TopKConfig
    from saehub_native.kernels import Kernels

TINY = 1e-12


class TopK:
    """f = relu(topk_k(p)),  p = x' W_encᵀ + b_enc,  x̂ = f W_dec + b_dec   (Gao et al. 2024, arXiv 2406.04093).

    x' = x − b_dec for an autoencoder and x' = x for a transcoder. Loss, on B rows, with V the variance of the calibration targets:
        L = Σ|x̂ − y|² / (B V) + α L_aux + L_push     (the first term is FVU, but for the batch's own variance; the others: auxk.py)
    Gradients, with e = y − x̂, G = −2e / (B V), δ_bj = ⟨G_b, W_dec[i_bj]⟩·[v_bj > 0] for the selected (value v, latent i) pairs:
        ∂W_dec[f] = Σ_{i_bj = f} v_bj G_b        ∂W_enc[f] = Σ_{i_bj = f} δ_bj x'_b        ∂b_enc[f] = Σ_{i_bj = f} δ_bj
        ∂b_dec = Σ_b G_b − ∂b_encᵀ W_enc         (the second path, through x', exists only where b_dec is subtracted)
    Decoder rows have unit norm: their gradients are projected on the tangent before the update, the rows renormalised after it.
    """

    def __init__(self, config: TopKConfig, job: Job, kernels: Kernels):
        self.config, self.job, self.kernels = config, job, kernels
        self.subtract_b_dec = job.target_site is None
        self.k_aux = config.aux_latents(job)
        self.constants: dict[str, float] = {}

    def init(self, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Decoder rows are directions of calibration rows blended with random ones; the encoder is tied to them.

        Its scale is the least-squares one: x̂ at the start is the best multiple of what the selected directions give.
        """
        n_latents, blend = self.config.d_sae(self.job), self.config.init_blend
        b_dec, x_mean = y_ND.mean(0), x_ND.mean(0)
        self.constants["variance"] = max(float((y_ND - b_dec).square().sum(1).mean()), TINY)

        picks_F = torch.randint(x_ND.shape[0], (n_latents,), generator=generator)
        noise_FD = torch.randn(n_latents, max(self.job.d_in, self.job.d_out), generator=generator)

        def directions(rows_ND: Tensor, mean_D: Tensor) -> Tensor:
            random_FD = _unit(noise_FD[:, : rows_ND.shape[1]].to(rows_ND))
            return _unit(blend * _unit(rows_ND[picks_F.to(rows_ND.device)] - mean_D) + (1 - blend) * random_FD)

        W_dec_FD = directions(y_ND, b_dec)
        W_enc_FD = directions(x_ND, x_mean)
        values, indices = self.kernels.encode_select(x_ND - x_mean, W_enc_FD, W_enc_FD.new_zeros(n_latents), self.config.k)
        guess_ND = self.kernels.decode(values, indices, W_dec_FD)
        scale = float(((y_ND - b_dec) * guess_ND).sum() / guess_ND.square().sum().clamp_min(TINY))
        W_enc_FD *= max(scale, 1e-2)
        b_enc_F = W_enc_FD.new_zeros(n_latents) if self.subtract_b_dec else -(W_enc_FD @ x_mean)
        return {"W_enc": W_enc_FD, "b_enc": b_enc_F, "W_dec": W_dec_FD, "b_dec": b_dec}

    def gradients(self, params: Mapping[str, Tensor], x_BD: Tensor, y_BD: Tensor, dead_F: Tensor) -> StepResult:
        W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = params["W_enc"], params["b_enc"], params["W_dec"], params["b_dec"]
        n_rows, n_latents = x_BD.shape[0], W_enc_FD.shape[0]
        # A fresh tensor even without subtraction: matrix products may depend on how their input is aligned in memory.
        centred_BD = x_BD - b_dec_D if self.subtract_b_dec else x_BD.clone()
        values_BK, indices_BK = self.kernels.encode_select(centred_BD, W_enc_FD, b_enc_F, self.config.k)
        residual_BD = (y_BD - b_dec_D).sub_(self.kernels.decode(values_BK, indices_BK, W_dec_FD))
        squared_error = residual_BD.square().sum()

        weight = 1.0 / (n_rows * self.constants["variance"])
        grad_BD = residual_BD * (-2 * weight)
        alive_BK = values_BK > 0  # a selected latent at zero is held there by the ReLU: no gradient
        delta_BK = self.kernels.value_gradients(grad_BD, indices_BK, W_dec_FD).mul_(alive_BK)
        firing = self.kernels.group(indices_BK, n_latents)
        ones_B1 = centred_BD.new_ones(n_rows, 1)
        grads = {
            "W_enc": self.kernels.latent_sums(firing, delta_BK, centred_BD),
            "b_enc": self.kernels.latent_sums(firing, delta_BK, ones_B1).squeeze(1),
            "W_dec": self.kernels.latent_sums(firing, values_BK, grad_BD),
        }
        loss = squared_error * weight
        loss = loss + add_auxk(grads, params, centred_BD, residual_BD, dead_F, k_aux=self.k_aux, alpha=self.config.auxk_alpha)
        grads["b_dec"] = grad_BD.sum(0)
        if self.subtract_b_dec:
            grads["b_dec"] -= grads["b_enc"] @ W_enc_FD
        loss = loss + add_bias_push(grads, params, dead_F, self.config.revive)

        fired_F = torch.zeros(n_latents, dtype=torch.bool, device=x_BD.device)
        fired_F[indices_BK[alive_BK]] = True
        return StepResult(grads, loss, squared_error, alive_BK.sum() / n_rows, fired_F)

    def before_update(self, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        # ∂W_dec − ⟨∂W_dec, w⟩ w: a step along w would be undone by the normalisation and would only feed Adam's moments.
        W_dec_FD, g_FD = params["W_dec"], grads["W_dec"]
        g_FD.addcmul_((g_FD * W_dec_FD).sum(1, keepdim=True), W_dec_FD, value=-1)

    def after_update(self, params: Mapping[str, Tensor]) -> None:
        W_dec_FD = params["W_dec"]
        W_dec_FD.div_(W_dec_FD.norm(dim=1, keepdim=True).clamp_min_(TINY))

    def export(self, params: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = dict(
            architecture="topk",
            params={"k": self.config.k},
            d_in=self.job.d_in,
            d_out=self.job.d_out,
            d_sae=self.config.d_sae(self.job),
            kind="autoencoder" if self.job.target_site is None else "transcoder",
            subtract_b_dec=self.subtract_b_dec,
        )
        tensors = {
            "W_enc": params["W_enc"].t().contiguous(),
            "b_enc": params["b_enc"].clone(),
            "W_dec": params["W_dec"].clone(),
            "b_dec": params["b_dec"].clone(),
        }
        return fields, tensors

    def read(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        expected = (self.job.d_in, self.config.d_sae(self.job), self.job.d_out)
        found = (config.d_in, config.d_sae, config.d_out)
        if config.architecture != "topk" or found != expected or bool(config.subtract_b_dec) != self.subtract_b_dec:
            raise UsageError(
                f"{self.job.init_from} cannot start the training of {self.job.id}",
                why=f"it is {config.architecture} with (d_in, d_sae, d_out) = {found}; needed: topk with {expected}, "
                f"subtract_b_dec {self.subtract_b_dec}",
                fix="give another init_from, or set d_sae to the checkpoint's",
            )
        params = {name: tensors[name].detach().float().clone() for name in ("b_enc", "W_dec", "b_dec")}
        params["W_enc"] = tensors["W_enc"].detach().float().t().contiguous()
        # The constraint holds from the first step: x̂ stays the same when the decoder's norms move into the encoder, the support need not.
        norms_F = params["W_dec"].norm(dim=1).clamp_min(TINY)
        params["W_dec"] /= norms_F[:, None]
        params["W_enc"] *= norms_F[:, None]
        params["b_enc"] *= norms_F
        return params


def _unit(rows_ND: Tensor) -> Tensor:
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(TINY)
