"""Pre-activations in; features out, of which each reaches a share of the row's largest: an architecture that saehub does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub import SAE, FormatError, SAEConfig


class Peak(SAE):
    """f_i = max(p_i, 0) [p_i ≥ τ m],  m = max_j p_j,  p = (x - b_dec) W_enc + b_enc,  x̂ = f W_dec + b_dec;  parameter `tau` in [0, 1).

    The number of active latents follows the row: one that a single direction explains costs one latent. saehub does the rest (norms,
    transcoders, float64 replay, files), because `SAE` holds everything but the activation.
    """

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        """FormatError unless tau is a share."""
        tau = config.params.get("tau")
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau < 1:
            raise FormatError(f"peak: parameter 'tau' is {tau!r}", why="expected a number from 0 to below 1")

    def _bar(self, p_BF: Tensor) -> Tensor:
        """τ max(m, 0) [n, 1]: what a latent must reach."""
        return self.config.params["tau"] * p_BF.amax(-1, keepdim=True).relu()

    def activate(self, p_BF: Tensor) -> Tensor:
        return torch.where(p_BF >= self._bar(p_BF), p_BF.relu(), 0)

    def margin(self, p_BF: Tensor) -> Tensor:
        # The largest latent leaves only at zero; every other one is compared with the bar.
        largest_BF = p_BF == p_BF.amax(-1, keepdim=True)
        return torch.where(largest_BF, p_BF.abs(), (p_BF - self._bar(p_BF)).abs())

    def rival(self, p_BF: Tensor) -> Tensor:
        return p_BF.argmax(-1, keepdim=True).expand(p_BF.shape)  # the bar moves with the largest: its rounding counts too
