"""One projection of the rows in, gated magnitudes out: the gated autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE, TensorSpec, matmul


class Gated(SAE):
    """π = x' W_enc; f = [π + b_gate > 0] max(π e^{r_mag} + b_mag, 0). Tensors b_gate, b_mag, r_mag [d_sae] in place of b_enc."""

    allows_decoder_norm_scaling = False
    scaled_by_input = ("b_gate", "b_mag", "b_dec")  # r_mag is a ratio

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        found = super().specs(config)
        del found["b_enc"]
        return found | {name: TensorSpec((config.d_sae,)) for name in ("b_gate", "b_mag", "r_mag")}

    def preacts(self, xp_BD: Tensor) -> Tensor:
        return matmul(xp_BD, self.W_enc)

    def activate(self, p_BF: Tensor) -> Tensor:
        return (p_BF * self._ratio(p_BF) + self.b_mag).relu() * (p_BF + self.b_gate > 0)

    def margin(self, p_BF: Tensor) -> Tensor:
        # In units of π: the gate opens at -b_gate, the magnitude at -b_mag e^{-r_mag}. A latent that is off must pass both it fails.
        gate_BF, magnitude_BF = p_BF + self.b_gate, p_BF + self.b_mag / self._ratio(p_BF)
        distances = torch.stack([gate_BF, magnitude_BF])
        on_BF = (distances > 0).all(0)
        failing = torch.where(distances > 0, 0, distances.abs())
        return torch.where(on_BF, distances.abs().amin(0), failing.amax(0))

    def rounding_scale(self, xp_BD: Tensor) -> Tensor:
        return matmul(xp_BD.abs(), self.W_enc, absolute=True) + torch.maximum(self.b_gate.abs(), self.b_mag.abs() / self._ratio(xp_BD))

    def _ratio(self, like: Tensor) -> Tensor:
        """e^{r_mag}, in the wider dtype of the two: a bf16 exponential would be wrong by 0.4 %."""
        return self.r_mag.to(torch.promote_types(self.r_mag.dtype, like.dtype)).exp()
