"""Rows of one language-model batch after another in; float64 sums by sequence, row moments and firing counts out, whatever the batches were."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def float64(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def plain(values: Tensor | np.ndarray) -> np.ndarray:
    """As float64 numpy."""
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with at least `size` rows; new ones are zero (doubled, so that growing costs little)."""
    if len(array) >= size:
        return array
    return np.concatenate([array, np.zeros((max(size, 2 * len(array)) - len(array), *array.shape[1:]), array.dtype)])


class SequenceSums:
    """Named sums over the rows of each sequence: what ratio estimates and their standard errors are made of."""

    def __init__(self) -> None:
        self.size = 0
        """One more than the greatest sequence index seen."""
        self._sums: dict[str, np.ndarray] = {}
        self._vectors: dict[str, np.ndarray] = {}

    def add(self, units_N: np.ndarray, **values: Tensor | np.ndarray) -> None:
        """Add per-row values [n] to the sums of the rows' sequences `units_N` (int64 [n])."""
        if len(units_N) == 0:
            return
        self.size = max(self.size, int(units_N.max()) + 1)
        for name, values_N in values.items():
            sums = _grown(self._sums.get(name, np.zeros(0)), self.size)
            found = np.bincount(units_N, weights=plain(values_N))
            sums[: len(found)] += found
            self._sums[name] = sums

    def add_vectors(self, units_N: np.ndarray, name: str, vectors_ND: Tensor) -> None:
        """Add row vectors [n, d] to the sequences' vector sums (summed in float64, kept in float32: [sequences, d] is the only large thing here)."""
        if len(units_N) == 0:
            return
        units_U, inverse_N = np.unique(units_N, return_inverse=True)
        vectors_ND = float64(vectors_ND)
        sums_UD = vectors_ND.new_zeros(len(units_U), vectors_ND.shape[1])
        sums_UD.index_add_(0, torch.from_numpy(inverse_N).to(vectors_ND.device), vectors_ND)
        size = int(units_N.max()) + 1
        kept = _grown(self._vectors.get(name, np.zeros((0, vectors_ND.shape[1]), np.float32)), size)
        kept[units_U] += sums_UD.cpu().numpy().astype(np.float32)
        self._vectors[name] = kept
        self.size = max(self.size, size)

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> np.ndarray:
        """float64 [size]; zeros for a name that was never added."""
        return _grown(self._sums.get(name, np.zeros(0)), self.size)[: self.size]

    def vectors(self, name: str) -> np.ndarray:
        """float32 [size, d]."""
        return _grown(self._vectors[name], self.size)[: self.size]


class RowMoments:
    """Count, sum and, if asked, second moments of rows in float64: their mean and covariance."""

    def __init__(self, width: int, device: torch.device, *, outer: bool = False):
        where = "cpu" if device.type == "mps" else device
        self.rows = 0
        self.sum_D = torch.zeros(width, dtype=torch.float64, device=where)
        self.outer_DD = torch.zeros(width, width, dtype=torch.float64, device=where) if outer else None

    def add(self, x_ND: Tensor) -> None:
        """Add rows [n, d]."""
        x_ND = float64(x_ND)
        self.rows += x_ND.shape[0]
        self.sum_D += x_ND.sum(0)
        if self.outer_DD is not None:
            self.outer_DD += x_ND.T @ x_ND

    def __add__(self, other: RowMoments) -> RowMoments:
        total = RowMoments(len(self.sum_D), self.sum_D.device)
        total.rows, total.sum_D = self.rows + other.rows, self.sum_D + other.sum_D
        if self.outer_DD is not None and other.outer_DD is not None:
            total.outer_DD = self.outer_DD + other.outer_DD
        return total

    @property
    def mean_D(self) -> Tensor:
        """float64 [d]; NaN without rows."""
        return self.sum_D / self.rows if self.rows else torch.full_like(self.sum_D, float("nan"))

    @property
    def covariance_DD(self) -> Tensor:
        """Second moments about the mean, divided by the number of rows."""
        mean_D = self.mean_D
        return self.outer_DD / self.rows - torch.outer(mean_D, mean_D)


class FiringCounts:
    """How often, and in how many sequences, each latent fired (was not 0). Sequences must come in ascending order."""

    def __init__(self, latents: int, device: torch.device | str = "cpu"):
        self.latents = latents
        self.rows = 0
        self.fired_F = torch.zeros(latents, dtype=torch.int64, device=device)
        """Rows on which each latent fired."""
        self.sequences_F = torch.zeros(latents, dtype=torch.int64, device=device)
        """Sequences in which each latent fired at least once."""
        self.last_F = torch.full((latents,), -1, dtype=torch.int64, device=device)
        """The last sequence in which each latent fired; -1 for never."""

    def add_dense(self, acts_BF: Tensor, units_B: Tensor) -> None:
        """Add dense features [n, F] of rows in sequences `units_B` (ascending)."""
        units_U, inverse_B = units_B.unique_consecutive(return_inverse=True)
        counts_UF = acts_BF.new_zeros(len(units_U), self.latents, dtype=torch.float32)
        self._add(counts_UF.index_add_(0, inverse_B, (acts_BF != 0).float()).long(), units_U, acts_BF.shape[0])

    def add_sparse(self, indices_BK: Tensor, units_B: Tensor) -> None:
        """Add active latents [n, K], padded with -1, of rows in sequences `units_B` (ascending)."""
        units_U, inverse_B = units_B.unique_consecutive(return_inverse=True)
        active_BK = indices_BK >= 0
        pairs = (inverse_B[:, None] * self.latents + indices_BK)[active_BK]
        counts_UF = torch.bincount(pairs, minlength=len(units_U) * self.latents).view(len(units_U), self.latents)
        self._add(counts_UF, units_U, indices_BK.shape[0])

    def _add(self, counts_UF: Tensor, units_U: Tensor, rows: int) -> None:
        fired_UF = counts_UF > 0
        self.rows += rows
        self.fired_F += counts_UF.sum(0)
        # A chunk may begin inside a sequence: its latents count once.
        again_F = fired_UF[0] & (self.last_F == units_U[0])
        self.sequences_F += fired_UF.sum(0) - again_F.long()
        self.last_F = torch.maximum(self.last_F, torch.where(fired_UF, units_U[:, None], -1).max(0).values)
