"""Calibration rows and a job in, first parameters out; trained parameters in, checkpoint tensors out, and back: what all architectures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.errors import UsageError
from saehub_native.kernels.lazy import RowSums

if TYPE_CHECKING:
    from saehub.api import Job
    from saehub_native.config import TrainConfig
    from saehub_native.kernels import Kernels

TINY = 1e-12


class Base:
    """Implements `saehub_native.architectures.Architecture` but for `gradients`.

    Shared by all:  x' = x − b_dec for an autoencoder and x' = x for a transcoder;  p = x' W_encᵀ + b_enc;  x̂ = f W_dec + b_dec, and
    + x W_skipᵀ for a skip transcoder. Decoder rows have unit norm: their gradients are projected on the tangent before the update, the rows
    renormalised after it.
    """

    takes_row_sums = True
    """Whether gradients of W_enc and W_dec may be `RowSums`."""
    unit_decoder = True
    """Whether decoder rows are held at norm 1."""

    def __init__(self, config: TrainConfig, job: Job, kernels: Kernels):
        self.config, self.job, self.kernels = config, job, kernels
        self.subtract_b_dec = job.target_site is None
        self.constants: dict[str, float] = {}

    # ------------------------------------------------------------------ start
    def init(self, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Decoder rows are directions of calibration rows blended with random ones; the encoder is tied to them.

        Its scale is the least-squares one: x̂ at the start is the best multiple of what the selected directions give.
        """
        n_latents, blend = self.config.d_sae(self.job), self.config.blend
        b_dec, x_mean = y_ND.mean(0), x_ND.mean(0)
        self.constants["variance"] = max(float((y_ND - b_dec).square().sum(1).mean()), TINY)

        picks_F = torch.randint(x_ND.shape[0], (n_latents,), generator=generator)
        noise_FD = torch.randn(n_latents, max(self.job.d_in, self.job.d_out), generator=generator)

        def directions(rows_ND: Tensor, mean_D: Tensor) -> Tensor:
            random_FD = unit(noise_FD[:, : rows_ND.shape[1]].to(rows_ND))
            return unit(blend * unit(rows_ND[picks_F.to(rows_ND.device)] - mean_D) + (1 - blend) * random_FD)

        W_dec_FD = directions(y_ND, b_dec)
        W_enc_FD = directions(x_ND, x_mean)
        values, indices = self.first_choice(x_ND - x_mean, W_enc_FD, W_enc_FD.new_zeros(n_latents))
        guess_ND = self.kernels.decode(values, indices, W_dec_FD)
        scale = float(((y_ND - b_dec) * guess_ND).sum() / guess_ND.square().sum().clamp_min(TINY))
        W_enc_FD *= max(scale, 1e-2)
        b_enc_F = W_enc_FD.new_zeros(n_latents) if self.subtract_b_dec else -(W_enc_FD @ x_mean)
        params = {"W_enc": W_enc_FD, "b_enc": b_enc_F, "W_dec": W_dec_FD, "b_dec": b_dec}
        if self.config.skip:
            params["W_skip"] = W_enc_FD.new_zeros(self.job.d_out, self.job.d_in)
        return params

    def first_choice(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> tuple[Tensor, Tensor]:
        """The latents that are expected to fire at the start: values and indices [N, K]."""
        raise NotImplementedError(f"{type(self).__name__}.first_choice")

    # ------------------------------------------------------------------ pieces of a step
    def centred(self, params: Mapping[str, Tensor], x_BD: Tensor, out: Tensor | None = None) -> Tensor:
        """x'. Never x itself, even without subtraction: matrix products may depend on how their input is aligned in memory."""
        if self.subtract_b_dec:
            return torch.sub(x_BD, params["b_dec"], out=out)
        return x_BD.clone() if out is None else out.copy_(x_BD)

    def unexplained(self, params: Mapping[str, Tensor], x_BD: Tensor, y_BD: Tensor, out: Tensor | None = None) -> Tensor:
        """y − b_dec − x W_skipᵀ: what the latents have to reconstruct; never y itself."""
        target_BD = torch.sub(y_BD, params["b_dec"], out=out)
        return target_BD.addmm_(x_BD, params["W_skip"].t(), alpha=-1) if self.config.skip else target_BD

    def outer_gradients(
        self, grads: dict[str, Tensor], params: Mapping[str, Tensor], delta_F: Tensor, grad_BD: Tensor, x_BD: Tensor
    ) -> None:
        """Add b_dec and W_skip to `grads`, from G = ∂L/∂x̂ and δ = Σ_b ∂L/∂p_b (which is ∂b_enc):

        ∂b_dec = Σ_b G_b − δᵀ W_enc  (the second path, through x', exists only where b_dec is subtracted),  ∂W_skip = Gᵀ x.
        """
        grads["b_dec"] = grad_BD.sum(0)
        if self.subtract_b_dec:
            grads["b_dec"] -= delta_F @ params["W_enc"]
        if self.config.skip:
            grads["W_skip"] = grad_BD.t() @ x_BD

    def before_update(self, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        # ∂W_dec − ⟨∂W_dec, w⟩ w: a step along w would be undone by the normalisation and would only feed Adam's moments.
        if self.unit_decoder:
            W_dec_FD, g_FD = params["W_dec"], grads["W_dec"]
            if isinstance(g_FD, RowSums):
                g_FD.sphere = True
                return
            g_FD.addcmul_((g_FD * W_dec_FD).sum(1, keepdim=True), W_dec_FD, value=-1)

    def after_update(self, params: Mapping[str, Tensor]) -> None:
        if self.unit_decoder and not self.config.freeze_decoder:
            W_dec_FD = params["W_dec"]
            W_dec_FD.div_(W_dec_FD.norm(dim=1, keepdim=True).clamp_min_(TINY))

    def resample(self, params: Mapping[str, Tensor], dead_N: Tensor, x_ND: Tensor, y_ND: Tensor, x_BD: Tensor) -> list[str]:
        """Bricken et al. 2023 (Towards Monosemanticity): w_dec = y' / |y'| with y' = y − b_dec, w_enc = x' / |x'| times a fifth of the living
        encoder rows' mean norm, and a bias that is 0 at the mean row. What else a latent has becomes the mean of the living.
        """
        alive_F = torch.ones(params["W_enc"].shape[0], dtype=torch.bool, device=dead_N.device).index_fill_(0, dead_N, False)
        alive_F = alive_F if alive_F.any() else ~alive_F
        mean_D = params["b_dec"] if self.subtract_b_dec else x_BD.mean(0)
        rows_ND = unit(x_ND - mean_D) * (0.2 * params["W_enc"][alive_F].norm(dim=1).mean())
        decoder_ND = unit(y_ND - params["b_dec"]) * params["W_dec"][alive_F].norm(dim=1).mean()
        changed = {"W_enc": rows_ND, "W_dec": decoder_ND}
        for name, p in params.items():
            if p.shape == alive_F.shape and name.startswith("b_"):
                changed[name] = torch.zeros_like(p[dead_N]) if self.subtract_b_dec else -(rows_ND @ mean_D)
            elif p.shape == alive_F.shape:
                changed[name] = p[alive_F].mean().expand(dead_N.numel())
        changed.pop("b_dec", None)  # as wide as the dictionary, by chance
        for name, values in changed.items():
            params[name][dead_N] = values
        return list(changed)

    # ------------------------------------------------------------------ checkpoints
    def extra_params(self) -> dict[str, Any]:
        """Numbers of the architecture in `saehub.json`, such as `{"k": 32}`."""
        return {}

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        kind = "autoencoder" if self.job.target_site is None else "skip_transcoder" if self.config.skip else "transcoder"
        fields = dict(
            architecture=self.config.architecture(),
            params=self.extra_params(),
            d_in=self.job.d_in,
            d_out=self.job.d_out,
            d_sae=self.config.d_sae(self.job),
            kind=kind,
            subtract_b_dec=self.subtract_b_dec,
        )
        tensors = {name: params[name].clone() for name in ("b_enc", "W_dec", "b_dec", "W_skip") if name in params}
        return fields, {"W_enc": params["W_enc"].t().contiguous(), **tensors}

    def read(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.refuse_other(config)
        params = {name: tensors[name].detach().float().clone() for name in ("b_enc", "W_dec", "b_dec", "W_skip") if name in tensors}
        params["W_enc"] = tensors["W_enc"].detach().float().t().contiguous()
        if self.unit_decoder:
            # The constraint holds from the first step: x̂ stays the same when the decoder's norms move into the encoder, the support need not.
            norms_F = params["W_dec"].norm(dim=1).clamp_min(TINY)
            params["W_dec"] /= norms_F[:, None]
            params["W_enc"] *= norms_F[:, None]
            params["b_enc"] *= norms_F
        return params

    def refuse_other(self, config: Any) -> None:
        """Raise UsageError unless a checkpoint's config is what this job trains."""
        job, word = self.job, self.config.architecture()
        expected = (job.d_in, self.config.d_sae(job), job.d_out)
        found = (config.d_in, config.d_sae, config.d_out)
        plain = (config.norm_in, config.norm_out, config.decoder_norm_scaling) == ("none", "none", False)
        same = config.architecture == word and bool(config.subtract_b_dec) == self.subtract_b_dec and config.skip == self.config.skip
        if not (same and plain and found == expected):
            raise UsageError(
                f"{job.init_from} cannot start the training of {job.id}",
                why=f"it is a {config.architecture} {config.kind} with (d_in, d_sae, d_out) = {found}, subtract_b_dec {config.subtract_b_dec}, "
                f"norms {config.norm_in}; needed: {word} with {expected}, subtract_b_dec {self.subtract_b_dec}, skip {self.config.skip}, no norms",
                fix="give another init_from, or set the width to the checkpoint's",
            )


def unit(rows_ND: Tensor) -> Tensor:
    """Rows divided by their norms."""
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(TINY)
