"""An SAE and pieces of a dataset in; when each latent first and last fired, how often beside its neighbour, and the scale of rows, out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saehub.api import Subject
from saehub.checkpoint.sae import SAE
from saehub.errors import StageFailed
from saehub_native.evaluate.pieces import Piece
from saehub_native.evaluate.subjects import SubjectRun

GROUPS = 10
"""Groups of sequences (index modulo 10) that jackknife errors leave out in turn."""


class HealthRun(SubjectRun):
    """A `SubjectRun` that also remembers rows: features are held dense, `chunk` rows at a time."""

    def __init__(self, subject: Subject, sae: SAE, device: str, memory: int, neighbour_F: np.ndarray):
        super().__init__(subject, sae, device, memory)
        self.neighbour_F = torch.from_numpy(neighbour_F).to(device)
        self.rows = 0
        self.first_F = torch.full((self.latents,), -1, dtype=torch.int64, device=device)
        """Row (counted from 0) on which each latent first fired; -1 for never."""
        self.last_row_F = torch.full((self.latents,), -1, dtype=torch.int64, device=device)
        self.fired_GF = torch.zeros(GROUPS, self.latents, dtype=torch.int64, device=device)
        self.joint_GF = torch.zeros_like(self.fired_GF)
        """Rows on which a latent and its neighbour both fired."""
        self.rows_G = np.zeros(GROUPS, dtype=np.int64)

    @property
    def _sparse(self) -> bool:
        return False

    def _count(self, acts_BF: Tensor, units_B: Tensor) -> tuple[Tensor, Tensor]:
        fired_BF = acts_BF != 0
        n = len(fired_BF)
        index_B1 = torch.arange(self.rows, self.rows + n, device=fired_BF.device)[:, None]
        any_F = fired_BF.any(0)
        first_F = self.rows + fired_BF.int().argmax(0)
        self.first_F = torch.where((self.first_F < 0) & any_F, first_F, self.first_F)
        self.last_row_F = torch.maximum(self.last_row_F, torch.where(fired_BF, index_B1, -1).amax(0)) if n else self.last_row_F
        both_BF = fired_BF & fired_BF[:, self.neighbour_F]
        for group in range(GROUPS):
            chosen_B = units_B % GROUPS == group
            count = int(chosen_B.sum())
            if count:
                self.fired_GF[group] += fired_BF[chosen_B].sum(0)
                self.joint_GF[group] += both_BF[chosen_B].sum(0)
                self.rows_G[group] += count
        self.rows += n
        return super()._count(acts_BF, units_B)

    def look(self, piece: Piece) -> None:
        """Encode and reconstruct the kept rows of `piece`; add norms and finiteness to the sums by sequence."""
        x_MD, y_MD = piece.kept(self.site), piece.kept(self.target)
        for part, yhat_BD, l0_B, l1_B in self.chunks(piece):
            if yhat_BD.shape[1] != y_MD.shape[1]:
                raise StageFailed(f"{self.subject.id} gives rows of {yhat_BD.shape[1]}", why=f"{self.target} has width {y_MD.shape[1]}")
            x_BD, y_BD = x_MD[part].to(yhat_BD.device), y_MD[part].to(yhat_BD.device)
            finite_B = x_BD.isfinite().all(1) & y_BD.isfinite().all(1) & yhat_BD.isfinite().all(1) & l1_B.isfinite()
            norm_B, wanted_B = x_BD.float().norm(dim=1), y_BD.float().norm(dim=1)
            counted_B = finite_B & (wanted_B > 0)
            ratio_B = torch.where(counted_B, yhat_BD.float().norm(dim=1) / wanted_B, 0.0)
            ones_B = torch.ones(len(norm_B))
            self.sums.add(
                piece.units_M[part], rows=ones_B, finite=finite_B, norm=torch.where(finite_B, norm_B, 0.0), ratio=ratio_B, counted=counted_B, l0=l0_B,
            )  # fmt: skip
            self.largest = max(getattr(self, "largest", 0.0), float(x_BD.abs().amax()) if len(x_BD) else 0.0)

    def dense_share(self, rate: float) -> tuple[float, float | None]:
        """Share of latents that fire on more than `rate` of the rows, with its jackknife error."""
        return _jackknife(self.fired_GF, self.joint_GF, self.rows_G, lambda fired_F, joint_F, rows: float((fired_F > rate * rows).double().mean()))

    def cofiring(self) -> tuple[float, float | None]:
        """Mean Jaccard index of firing with the nearest decoder neighbour, over latents that fired, with its jackknife error."""

        def mean(fired_F: Tensor, joint_F: Tensor, rows: int) -> float:
            alive_F = fired_F > 0
            either_F = (fired_F + fired_F[self.neighbour_F] - joint_F)[alive_F]
            return float((joint_F[alive_F] / either_F).double().mean()) if bool(alive_F.any()) else float("nan")

        return _jackknife(self.fired_GF, self.joint_GF, self.rows_G, mean)

    def curve(self, points: int, burst: float) -> dict[str, list[float]]:
        """rows read, share silent so far, and 3/N at these rows for bursts of `burst` firings."""
        first_F = np.sort(self.first_F.cpu().numpy())
        first_F = first_F[first_F >= 0]
        rows = np.unique(np.geomspace(1, max(self.rows, 1), points).round().astype(np.int64))
        silent = 1 - np.searchsorted(first_F, rows) / self.latents
        return {"rows": rows.tolist(), "silent": silent.tolist(), "bound": (3 * burst / rows).tolist()}

    def waking_share(self) -> float:
        """Share of latents that first fired in the second half of the rows."""
        return float((self.first_F >= self.rows / 2).double().mean())

    def silent_in_last(self, window: int) -> float:
        """Share of latents that did not fire in the last `window` rows."""
        return float((self.last_row_F < self.rows - window).double().mean())


def _jackknife(fired_GF: Tensor, joint_GF: Tensor, rows_G: np.ndarray, statistic) -> tuple[float, float | None]:
    """A statistic of firing counts and its delete-one-group error, se² = (G-1)/G Σ_g (t_(g) - t̄)² over the groups with rows."""
    fired_F, joint_F, rows = fired_GF.sum(0), joint_GF.sum(0), int(rows_G.sum())
    value = statistic(fired_F, joint_F, rows)
    groups = np.flatnonzero(rows_G)
    if len(groups) < 2:
        return value, None
    without = np.array([statistic(fired_F - fired_GF[g], joint_F - joint_GF[g], rows - int(rows_G[g])) for g in groups])
    return value, float(np.sqrt((len(groups) - 1) / len(groups) * ((without - without.mean()) ** 2).sum()))
