"""Pre-activations in, those above one common threshold out: BatchTopK at inference (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from saehub.checkpoint.architectures.jumprelu import JumpReLU
from saehub.checkpoint.config import SAEConfig, number
from saehub.checkpoint.sae import TensorSpec


class BatchTopK(JumpReLU):
    """f_i = max(p_i, 0) [p_i > θ], θ a scalar for all latents; in training the k·n largest of a batch, k a row on average.

    `params["k"]` records that average (it need not be whole) and does not enter the equation.
    """

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if "k" in config.params:
            number(config, "k", least=0)

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        return super().specs(config) | {"threshold": TensorSpec(())}
