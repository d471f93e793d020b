"""Pre-activations in, their positive parts out: the ReLU autoencoder (Bricken et al. 2023; SAELens `standard`)."""

from __future__ import annotations

from torch import Tensor

from saehub.checkpoint.sae import SAE


class ReLU(SAE):
    """f = max(p, 0)."""

    def activate(self, p_BF: Tensor) -> Tensor:
        return p_BF.relu()

    def margin(self, p_BF: Tensor) -> Tensor:
        return p_BF.abs()  # the boundary is 0
