"""Pre-activations in, the positive parts of each row's k largest out: the TopK autoencoder (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub.checkpoint.config import SAEConfig, whole
from saehub.checkpoint.sae import SAE, sort_selection


class TopK(SAE):
    """f_i = max(p_i, 0) if p_i is among the row's k largest, else 0. Whether the ReLU comes before or after makes no difference to f."""

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        whole(config, "k", most=config.d_sae)

    @property
    def k(self) -> int:
        """Latents kept a row."""
        return int(self.config.params["k"])

    @property
    def max_active(self) -> int:
        return self.k

    def ranked(self, p_BF: Tensor) -> Tensor:
        """What the k largest are chosen by."""
        return p_BF

    def kept(self, p_BK: Tensor) -> Tensor:
        """Activations of the chosen pre-activations."""
        return p_BK.relu()

    def select(self, p_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices [n, k] of each row's choice, unsorted, zeros included."""
        indices_BK = self.ranked(p_BF).topk(self.k, dim=-1, sorted=False).indices
        return self.kept(p_BF.gather(-1, indices_BK)), indices_BK

    def activate(self, p_BF: Tensor) -> Tensor:
        values_BK, indices_BK = self.select(p_BF)
        return torch.zeros_like(p_BF).scatter(-1, indices_BK, values_BK)

    def _encode_chunk(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = self.select(self.preacts(self.centre(x_BD)))
        return sort_selection(values_BK, indices_BK, self.config.d_sae)

    def margin(self, p_BF: Tensor) -> Tensor:
        # A chosen latent leaves where it meets the best one left out (or 0), one left out enters where it meets the last one chosen.
        ranked_BF = self.ranked(p_BF)
        order = self._around_the_cut(ranked_BF)
        last_in_B1, first_out_B1 = ranked_BF.gather(1, order).clamp(min=0).split(1, dim=1)
        if self.k == self.config.d_sae:
            first_out_B1 = torch.zeros_like(first_out_B1)
        chosen_BF = torch.zeros_like(p_BF, dtype=torch.bool).scatter(1, ranked_BF.topk(self.k, dim=1, sorted=False).indices, True)
        return (ranked_BF - torch.where(chosen_BF, first_out_B1, last_in_B1)).abs()

    def rival(self, p_BF: Tensor) -> Tensor:
        ranked_BF = self.ranked(p_BF)
        last_in_B1, first_out_B1 = self._around_the_cut(ranked_BF).split(1, dim=1)
        chosen_BF = ranked_BF >= ranked_BF.gather(1, last_in_B1)
        return torch.where(chosen_BF, first_out_B1, last_in_B1)

    def _around_the_cut(self, ranked_BF: Tensor) -> Tensor:
        """int64 [n, 2]: the k-th and the (k+1)-th largest (the k-th twice where k = d_sae)."""
        order_BK = ranked_BF.topk(min(self.k + 1, self.config.d_sae), dim=1).indices
        return order_BK[:, [self.k - 1, min(self.k, self.config.d_sae - 1)]]
