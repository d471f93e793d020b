"""A BatchTopK whose leading groups of latents reconstruct by themselves (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from torch import Tensor

from saehub.checkpoint.architectures.batchtopk import BatchTopK
from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import TensorSpec
from saehub.errors import FormatError, UsageError


class Matryoshka(BatchTopK):
    """Encodes as BatchTopK; group g holds group_sizes[g] latents, and the first groups alone give x̂_g = f[:n_g] W_dec[:n_g] + b_dec."""

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        return super().specs(config) | {"group_sizes": TensorSpec((None,), floating=False)}

    def _check_values(self) -> None:
        sizes = self.group_sizes.tolist()
        if not sizes or min(sizes) < 1 or sum(sizes) != self.config.d_sae:
            raise FormatError(f"group_sizes is {sizes}", why=f"expected positive sizes that sum to d_sae = {self.config.d_sae}")

    def decode_prefix(self, acts: Tensor, groups: int, like: Tensor | None = None) -> Tensor:
        """The reconstruction [..., d_out] by the first `groups` groups, from features [..., d_sae]."""
        if not 1 <= groups <= self.group_sizes.shape[0]:
            raise UsageError(f"there is no prefix of {groups} groups", fix=f"1 to {self.group_sizes.shape[0]}")
        kept = acts.clone()
        kept[..., int(self.group_sizes[:groups].sum()) :] = 0
        return self.decode(kept, like=like)
