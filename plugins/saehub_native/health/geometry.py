"""Decoder rows in; each one's nearest neighbour, near-duplicate clusters, and what random directions would give, out, in blocks of bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """The nearest other decoder row of every latent."""

    cosine_F: np.ndarray
    """float64 [F]: max over j≠i of cos(d_i, d_j); -1 with a single latent."""
    index_F: np.ndarray
    """int64 [F]: the j that has it."""
    pairs: int
    """Pairs of at least the threshold's cosine."""
    cluster_F: np.ndarray
    """int64 [F]: the smallest member of each latent's cluster, clusters being connected by such pairs."""

    @property
    def redundancy(self) -> float:
        """Mean of the maxima; 0 with a single latent, which resembles no other."""
        return float(self.cosine_F.mean()) if len(self.cosine_F) > 1 else 0.0

    def cluster_sizes(self) -> list[int]:
        """Sizes of the clusters of two or more, descending."""
        sizes = np.bincount(self.cluster_F)
        return sorted((int(size) for size in sizes[sizes > 1]), reverse=True)

    def closest(self, n: int) -> list[list[float]]:
        """Up to `n` pairs [i, j, cosine], closest first, each a latent with its nearest neighbour."""
        order = np.argsort(-self.cosine_F, kind="stable")
        seen, found = set(), []
        for i in order[: 2 * n + 2].tolist() if len(self.cosine_F) > 1 else []:
            pair = (min(i, int(self.index_F[i])), max(i, int(self.index_F[i])))
            if pair not in seen and len(found) < n:
                seen.add(pair)
                found.append([*pair, round(float(self.cosine_F[i]), 6)])
        return found


def unit(W_FD: Tensor) -> Tensor:
    """Rows divided by their norms (float32 at least), whatever their scale; zero rows stay zero."""
    W_FD = W_FD.detach().to(torch.promote_types(W_FD.dtype, torch.float32))
    W_FD = W_FD / W_FD.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(W_FD.dtype).tiny)  # else squares of 1e25 or 1e-25 leave the range
    norms_F1 = W_FD.norm(dim=1, keepdim=True)
    return torch.where(norms_F1 > 0, W_FD / norms_F1, 0.0)


def neighbours(W_FD: Tensor, threshold: float, memory: int) -> Neighbours:
    """Nearest neighbours of all rows of a decoder [F, d], b rows against all others at a time, b·F cosines within `memory` bytes."""
    u_FD = unit(W_FD)
    latents = len(u_FD)
    best_F, index_F = torch.full((latents,), -1.0), torch.zeros(latents, dtype=torch.int64)
    labels_F, pairs = np.arange(latents), 0
    step = max(1, memory // (8 * latents))
    for at in range(0, latents, step):
        cosines_BF = u_FD[at : at + step] @ u_FD.T
        rows_B = torch.arange(len(cosines_BF), device=cosines_BF.device)
        cosines_BF[rows_B, rows_B + at] = -2.0
        if latents > 1:
            best_B, index_B = cosines_BF.max(1)
            best_F[at : at + step], index_F[at : at + step] = best_B.cpu(), index_B.cpu()
        near_B = torch.nonzero(best_F[at : at + step] >= threshold).flatten().tolist()
        for row in near_B:
            members = torch.nonzero(cosines_BF[row] >= threshold).flatten().cpu().numpy()
            pairs += int((members > at + row).sum())
            _join(labels_F, at + row, members)
    return Neighbours(best_F.double().numpy(), index_F.numpy(), pairs, labels_F)


def _join(labels_F: np.ndarray, i: int, members: np.ndarray) -> None:
    """Put latent i and `members` into one cluster, named by its smallest latent."""
    names = np.unique(np.append(labels_F[members], labels_F[i]))
    if len(names) > 1:
        labels_F[np.isin(labels_F, names)] = names[0]


def random_maximum(latents: int, width: int) -> tuple[float, float]:
    """Mean and standard deviation of max_{j≠i} cos(u_i, u_j) over F independent directions, uniform on the sphere of R^d.

        p(θ) ∝ sin(θ)^(d-2),  c = cos θ          the angle between two random directions (d ≥ 2)
        P(max ≤ c) = (1 - P(angle < θ))^(F-1)    the others are independent of each other, given one

    Integrated on a grid around 90°, 40 standard deviations wide or the whole half circle, to about 1e-5. d = 1 knows ±1 alone.
    """
    others = latents - 1
    if others < 1:
        return 0.0, 0.0
    if width == 1:
        mean = 1 - 2 * 0.5**others
        return mean, math.sqrt(max(0.0, 1 - mean**2))
    reach = min(math.pi / 2, 20 / math.sqrt(width))
    theta = np.linspace(math.pi / 2 - reach, math.pi / 2 + reach, 40_001)
    middle = (theta[1:] + theta[:-1]) / 2
    cells = np.exp((width - 2) * np.log(np.clip(np.sin(middle), 1e-300, 1)))
    below = np.concatenate([[0.0], np.cumsum(cells)]) / cells.sum()  # P(angle < θ)
    with np.errstate(divide="ignore"):
        at_most = np.exp(others * np.log1p(-np.clip(below, 0, 1)))  # P(max ≤ cos θ)
    mass = at_most[:-1] - at_most[1:]
    mean = float(mass @ np.cos(middle))
    return mean, math.sqrt(max(0.0, float(mass @ np.cos(middle) ** 2) - mean**2))


def column_cosine(W_enc_DF: Tensor, W_dec_FD: Tensor) -> np.ndarray:
    """float64 [F]: cos(encoder column i, decoder row i)."""
    return (unit(W_enc_DF.T) * unit(W_dec_FD)).sum(1).double().cpu().numpy()
