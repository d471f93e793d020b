"""Row moments of one dataset in; reconstructions that no sparse autoencoder was needed for out: PCA and a random dictionary with the same k."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saehub.seeds import generator
from saehub_native.evaluate.accumulate import RowMoments, float64


class PCA:
    """x̂ = μ + V_k V_kᵀ (x - μ), with μ the mean and V_k the k first principal directions of the rows it was fitted on.

    Fitted on two halves (even and odd sequences) of one dataset. Rows of that dataset are reconstructed from the *other* half's fit;
    rows of any other dataset from the fit on both halves.
    """

    def __init__(self, halves: tuple[RowMoments, RowMoments]):
        self.halves = halves
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}

    def _basis(self, half: int) -> tuple[Tensor, Tensor]:
        """(μ [d], V [d, d] by falling variance) of half 0, half 1, or both (2); float64, computed once."""
        if half not in self._bases:
            moments = self.halves[half] if half < 2 else self.halves[0] + self.halves[1]
            _, vectors_DD = torch.linalg.eigh(moments.covariance_DD)
            self._bases[half] = (moments.mean_D, vectors_DD.flip(1))
        return self._bases[half]

    def reconstruct(self, x_ND: Tensor, units_N: np.ndarray, k: int, *, own: bool) -> Tensor:
        """float64 [n, d]; `own` says that the rows belong to the dataset it was fitted on."""
        x_ND = float64(x_ND)
        if not own:
            return self._project(x_ND, 2, k)
        odd_N = torch.from_numpy(units_N % 2 == 1).to(x_ND.device)
        return torch.where(odd_N[:, None], self._project(x_ND, 0, k), self._project(x_ND, 1, k))

    def _project(self, x_ND: Tensor, half: int, k: int) -> Tensor:
        mean_D, vectors_DD = self._basis(half)
        top_DK = vectors_DD[:, :k]
        return mean_D + ((x_ND - mean_D) @ top_DK) @ top_DK.T


@dataclass(frozen=True)
class RandomDictionary:
    """F random unit directions; each row picks the k with the greatest projections of x - μ, and is projected onto their span.

        S(x) = top-k_i of ⟨x - μ, w_i⟩        x̂ = μ + P_span{w_i, i∈S(x)} (x - μ)

    The coefficients are the best possible ones for the chosen directions (least squares), so no training of a decoder's scale could do
    better: what an SAE gains over this, it gained by its directions and its choice of them.
    """

    mean_D: Tensor
    """μ, float64 [d]."""
    W_FD: Tensor
    """float32 [F, d], rows of norm 1."""
    k: int

    @classmethod
    def make(cls, mean_D: Tensor, latents: int, k: int, seed: int) -> RandomDictionary:
        """Directions drawn from the recipe's seed and the sizes: the same for every SAE of that width."""
        width = len(mean_D)
        W_FD = torch.randn(latents, width, generator=generator(seed, "native/core", "random dictionary", latents, width))
        return cls(mean_D, (W_FD / W_FD.norm(dim=1, keepdim=True)).to(mean_D.device), k)

    def reconstruct(self, x_ND: Tensor, memory: int) -> Tensor:
        """float64 [n, d], in chunks that fit `memory` bytes."""
        x_ND = float64(x_ND)
        latents, width = self.W_FD.shape
        step = max(1, memory // (12 * latents + 24 * self.k * width + 16 * self.k**2))
        return torch.cat([self._chunk(x_ND[at : at + step]) for at in range(0, len(x_ND), step)]) if len(x_ND) else x_ND

    def _chunk(self, x_BD: Tensor) -> Tensor:
        if self.k >= x_BD.shape[1]:
            return x_BD  # d random directions span everything
        centred_BD = x_BD - self.mean_D
        chosen_BK = (centred_BD.float() @ self.W_FD.T).topk(self.k, dim=1, sorted=False).indices
        w_BKD = self.W_FD[chosen_BK].double()
        gram_BKK = w_BKD @ w_BKD.mT
        # Nearly parallel directions: a jitter far below what is measured keeps the factorisation defined.
        gram_BKK.diagonal(dim1=1, dim2=2).add_(1e-10)
        factor_BKK = torch.linalg.cholesky(gram_BKK)
        weights_BK1 = torch.cholesky_solve(w_BKD @ centred_BD[:, :, None], factor_BKK)
        return self.mean_D + (w_BKD.mT @ weights_BK1)[:, :, 0]
