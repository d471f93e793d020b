"""Rows, targets and parameters of an architecture without a fixed k in; loss and gradients out, computed densely in chunks of rows of bounded size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub_native.architectures import StepResult
from saehub_native.architectures.auxk import add_bias_push
from saehub_native.architectures.base import TINY, Base

if TYPE_CHECKING:
    from saehub_native.config_dense import DenseConfig

CHUNK_BYTES = 16 << 20  # bytes of one [rows, latents] tensor; about six of them exist at a time


@dataclass
class Batch:
    """What the chunks of one batch share and add to."""

    n_rows: int
    weight: float
    """1 / (B V): what turns Σ|x̂ − y|² into the first term of the loss."""
    coefficient: float
    """λ of this step, warm-up included."""
    unit: float
    """√V: activations are measured in it, so that λ does not depend on the scale of the data."""
    step: int | None
    grads: dict[str, Tensor]
    penalty: Tensor
    """Sum of the loss terms beside the first one."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Further totals of the architecture; `delta`: Σ_b ∂L/∂p_b where it is not b_enc's gradient."""


class Dense(Base):
    """Every architecture whose L0 is the outcome of a penalty; a subclass gives `chunk`, and `close` where something is known only at the end.

    Loss, on B rows, with V the variance of the calibration targets:   L = Σ|x̂ − y|² / (B V) + λ · penalty + L_push   (auxk.py).
    λ rises linearly over the first `sparsity_warmup` of the steps. With `target_l0` it is steered, step by step, with m = ln(L0 / target)
    limited to [−1, 1], g = CONTROL / steps and I kept in the state:   I ← I + g m,   λ = sparsity · exp(I + m).
    What is left between the L0 of the last batches and the target, on rows that none has trained on, `export` takes out: one number, the same for
    all latents, moves what decides whether they fire, so that `target_l0` · N latents do on the N calibration rows (`threshold`).
    """

    config: DenseConfig
    CONTROL = 20.0
    FIRST: float | None = 4.0
    """How many times the wanted number of latents fire at the start. None: another parameter than a bias decides that."""
    steered = True
    """Whether `target_l0` steers λ (else the penalty itself aims at it)."""

    def init(self, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Where a bias decides what fires, it starts where `FIRST` times the wanted L0 does: few enough not to begin with half of all latents on
        every row, more than enough for all of them to learn before λ has thinned them out.
        """
        params = super().init(x_ND, y_ND, generator)
        self.constants |= {"control": 0.0, "excess": 0.0}
        if self.FIRST:
            values_NK, indices_NK, theta = self.cutoff(params, x_ND, self.FIRST * self.config.first_l0(self.job))
            guess_ND = self.kernels.decode(values_NK.sub_(theta).relu_(), indices_NK, params["W_dec"])
            scale = float(((y_ND - params["b_dec"]) * guess_ND).sum() / guess_ND.square().sum().clamp_min(TINY))  # least squares
            params["b_enc"] -= theta
            for name in ("W_enc", "b_enc"):
                params[name] *= max(scale, 1e-2)
        return params

    def cutoff(self, params: Mapping[str, Tensor], x_ND: Tensor, l0: float) -> tuple[Tensor, Tensor, Tensor]:
        """The l0·N largest pre-activations of N rows (values and indices [N, K]), and the least of them, θ."""
        wanted = max(1, min(self.config.d_sae(self.job), round(l0)))
        values_NK, indices_NK = self.kernels.encode_select_batch(self.centred(params, x_ND), params["W_enc"], params["b_enc"], wanted)
        theta = values_NK[values_NK > 0].min() if (values_NK > 0).any() else values_NK.new_tensor(1e-3)
        return values_NK, indices_NK, theta

    def threshold(self, params: Mapping[str, Tensor], x_ND: Tensor | None, W_enc_FD: Tensor, b_enc_F: Tensor) -> float | None:
        """The `target_l0`·N-th largest of x' W_encᵀ + b_enc over the N rows, where it is positive; None without rows or a target."""
        if x_ND is None or self.config.target_l0 is None:
            return None
        values_NK, _ = self.kernels.encode_select_batch(self.centred(params, x_ND), W_enc_FD, b_enc_F, math.ceil(self.config.target_l0))
        positive = values_NK[values_NK > 0]
        wanted = min(positive.numel(), round(self.config.target_l0 * x_ND.shape[0]))
        return float(torch.topk(positive, wanted).values[-1]) if wanted else None

    def settled(self, params: Mapping[str, Tensor], x_ND: Tensor | None) -> Mapping[str, Tensor]:
        """The parameters, with the bias that decides what fires moved to `threshold`."""
        above = 4 * math.sqrt(self.constants["variance"])  # of pre-activations that do not fire yet, too, the largest are found
        found = self.threshold(params, x_ND, params["W_enc"], params[self.bias] + above)
        return params if found is None else {**params, self.bias: params[self.bias] + (above - found)}

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return super().export(self.settled(params, x_ND))

    def first_choice(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.encode_select(x_ND, W_enc_FD, b_enc_F, self.config.first_l0(self.job))

    def coefficient(self, step: int | None) -> float:
        """λ of a step."""
        config = self.config
        span = config.sparsity_warmup * self.job.steps
        rising = 1.0 if step is None else min(1.0, (step + 1) / span if span else 1.0)
        steering = self.constants["control"] + self.constants["excess"] if self.steered and config.target_l0 is not None else 0.0
        return config.first_sparsity() * rising * math.exp(steering)

    def gradients(self, params: Mapping[str, Tensor], x_BD: Tensor, y_BD: Tensor, dead_F: Tensor, step: int | None = None) -> StepResult:
        n_rows, n_latents = x_BD.shape[0], params["W_enc"].shape[0]
        variance = self.constants["variance"]
        centred_BD, residual_BD = self.centred(params, x_BD), self.unexplained(params, x_BD, y_BD)
        batch = Batch(
            n_rows,
            1.0 / (n_rows * variance),
            self.coefficient(step),
            math.sqrt(variance),
            step,
            {name: torch.zeros_like(p) for name, p in params.items() if name not in ("b_dec", "W_skip")},
            x_BD.new_zeros(()),
        )
        grad_BD, active, fired_F = torch.empty_like(residual_BD), x_BD.new_zeros(()), torch.zeros_like(dead_F)
        chunk = max(64, CHUNK_BYTES // (4 * n_latents))
        for start in range(0, n_rows, chunk):
            part = slice(start, start + chunk)
            acts_cF, grad_BD[part] = self.chunk(params, centred_BD[part], residual_BD[part], batch)
            on_cF = acts_cF > 0
            active += on_cF.sum()
            fired_F |= on_cF.any(0)
        l0 = active / n_rows
        self.close(params, batch, l0)
        squared_error = residual_BD.square().sum()
        self.outer_gradients(batch.grads, params, batch.sums.get("delta", batch.grads.get("b_enc")), grad_BD, x_BD)
        loss = squared_error * batch.weight + batch.penalty + add_bias_push(batch.grads, params, dead_F, self.config.revive, self.bias)
        if self.steered and self.config.target_l0 is not None and step is not None:
            self._steer(float(l0))
        return StepResult(batch.grads, loss, squared_error, l0, fired_F, residual_BD, {"sparsity": batch.coefficient})

    bias = "b_enc"
    """The bias that decides whether a latent fires."""

    def chunk(self, params: Mapping[str, Tensor], x_cD: Tensor, residual_cD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """From x' [c, d_in] and what is to be reconstructed [c, d_out]: turn the latter into the residual, add to `batch`, return f [c, F] and
        G = ∂L/∂x̂ [c, d_out]."""
        raise NotImplementedError(f"{type(self).__name__}.chunk")

    def close(self, params: Mapping[str, Tensor], batch: Batch, l0: Tensor) -> None:
        """After the last chunk: what depends on the batch's L0."""

    def _steer(self, l0: float) -> None:
        excess = max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.config.target_l0)))
        self.constants["control"] += self.CONTROL / self.job.steps * excess
        self.constants["excess"] = excess
