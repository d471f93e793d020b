"""Pre-activations in, those above a threshold of their own out: JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE, TensorSpec


class JumpReLU(SAE):
    """f_i = max(p_i, 0) [p_i > θ_i], strictly; a negative θ_i makes it a plain ReLU. θ keeps its own dtype (float32 beside bf16 weights)."""

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        return super().specs(config) | {"threshold": TensorSpec((config.d_sae,))}

    def activate(self, p_BF: Tensor) -> Tensor:
        # Compared in the wider dtype of the two: a 0-d threshold would otherwise be rounded to the dtype of p.
        wide = torch.promote_types(p_BF.dtype, self.threshold.dtype)
        return p_BF.relu() * (p_BF.to(wide) > self.threshold.to(wide))

    def margin(self, p_BF: Tensor) -> Tensor:
        return (p_BF - self.threshold.to(p_BF.dtype).clamp(min=0)).abs()
