"""Pre-activations in, the largest of each group of latents out: group-max (eai-sparsify `groupmax`)."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub.checkpoint.config import SAEConfig, whole
from saehub.checkpoint.sae import SAE, sort_selection
from saehub.errors import FormatError


class GroupMax(SAE):
    """The latents stand in k contiguous groups of d_sae/k; f_i = max(p_i, 0) if p_i is the largest of its group, else 0."""

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        k = whole(config, "k", most=config.d_sae)
        if config.d_sae % k:
            raise FormatError(f"groupmax with k={k} and d_sae={config.d_sae}", why="k must divide d_sae")

    @property
    def k(self) -> int:
        """Number of groups, and most active latents a row."""
        return int(self.config.params["k"])

    @property
    def max_active(self) -> int:
        return self.k

    def select(self, p_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices [n, k], one a group, ascending, zeros included."""
        size = self.config.d_sae // self.k
        values_BK, within_BK = p_BF.unflatten(-1, (self.k, size)).max(dim=-1)
        return values_BK.relu(), within_BK + torch.arange(0, self.config.d_sae, size, device=p_BF.device)

    def activate(self, p_BF: Tensor) -> Tensor:
        values_BK, indices_BK = self.select(p_BF)
        return torch.zeros_like(p_BF).scatter(-1, indices_BK, values_BK)

    def _encode_chunk(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = self.select(self.preacts(self.centre(x_BD)))
        return sort_selection(values_BK, indices_BK, self.config.d_sae)

    def margin(self, p_BF: Tensor) -> Tensor:
        grouped = p_BF.unflatten(-1, (self.k, -1))
        if grouped.shape[-1] == 1:
            return p_BF.abs()
        best, second = grouped.topk(2, dim=-1).values.clamp(min=0).split(1, dim=-1)
        winner = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, grouped.argmax(-1, keepdim=True), True)
        return (grouped - torch.where(winner, second, best)).abs().flatten(-2)

    def rival(self, p_BF: Tensor) -> Tensor:
        grouped = p_BF.unflatten(-1, (self.k, -1))
        size = grouped.shape[-1]
        order = grouped.topk(min(2, size), dim=-1).indices
        winner = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, order[..., :1], True)
        within = torch.where(winner, order[..., -1:], order[..., :1])
        return (within + torch.arange(0, self.config.d_sae, size, device=p_BF.device)[:, None]).flatten(-2)
