"""An SAE and pieces of a dataset in; its reconstructions, and everything counted on the way, out: in chunks, so that rows × latents is never whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saehub.api import Subject
from saehub.checkpoint.sae import SAE
from saehub.errors import StageFailed
from saehub_native.evaluate.accumulate import FiringCounts, SequenceSums
from saehub_native.evaluate.metrics import row_quantities
from saehub_native.evaluate.pieces import Piece

BYTES_A_LATENT = 16
"""float32 pre-activations, features and two temporaries, per row and latent."""


class SubjectRun:
    """One SAE on one dataset: sums by sequence, firing counts, and why it failed, if it did."""

    def __init__(self, subject: Subject, sae: SAE, device: str | torch.device, memory: int):
        """`sae` is the subject's, on `device`; features take at most `memory` bytes at a time."""
        self.subject, self.sae = subject, sae
        self.site, self.target = subject.site, subject.target_site or subject.site
        self.latents = self.sae.config.d_sae
        self.chunk = max(1, memory // (BYTES_A_LATENT * self.latents))
        self.sums = SequenceSums()
        self.firing = FiringCounts(self.latents, device)
        self.failure: str | None = None
        self.broken_rows = 0
        """Rows whose features or reconstruction hold NaN or infinity."""

    @property
    def paired(self) -> bool:
        """Whether it reconstructs its own input (no transcoder)."""
        return self.site == self.target and self.sae.config.d_in == self.sae.config.d_out

    @property
    def declared_k(self) -> int | None:
        """The architecture's own k, where it has one."""
        k = self.sae.config.params.get("k")
        return int(k) if k else None

    @property
    def _sparse(self) -> bool:
        """Whether decoding active latents alone is defined, exact and cheaper than all of them."""
        most = self.sae.max_active
        ours = type(self.sae).decode is SAE.decode
        return ours and most is not None and 8 * most <= self.latents and self.sae.W_dec.dtype in (torch.float32, torch.float64)

    def chunks(self, piece: Piece) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(part of the kept rows, ŷ [b, d_out], L0 [b], L1 [b]) for all kept rows of `piece`; firing is counted."""
        device = self.firing.fired_F.device
        units_M = torch.from_numpy(piece.units_M).to(device)
        if not self.sae.row_wise:
            if piece.context is None:
                raise StageFailed(f"{self.subject.id} needs whole sequences", why="its architecture is not row-wise, and the rows carry no sequences")
            x_BTD = piece.whole(self.site).to(device)
            acts_BTF = self.sae.encode(x_BTD)
            yhat_BTD = self.sae.decode(acts_BTF, like=x_BTD)
            keep_N = piece.keep_N.to(device)
            yield slice(0, len(units_M)), yhat_BTD.flatten(0, 1)[keep_N], *self._count(acts_BTF.flatten(0, 1)[keep_N], units_M)
            return
        x_MD = piece.kept(self.site).to(device)
        for at in range(0, len(units_M), self.chunk):
            part = slice(at, min(at + self.chunk, len(units_M)))
            x_BD = x_MD[part]
            if self._sparse:
                values_BK, indices_BK = self.sae.encode_sparse(x_BD)
                self.firing.add_sparse(indices_BK, units_M[part])
                yield part, self.sae.decode_sparse(values_BK, indices_BK, like=x_BD), (indices_BK >= 0).sum(1), _l1(values_BK)
            else:
                acts_BF = self.sae.encode(x_BD)
                yield part, self.sae.decode(acts_BF, like=x_BD), *self._count(acts_BF, units_M[part])

    def _count(self, acts_BF: Tensor, units_B: Tensor) -> tuple[Tensor, Tensor]:
        self.firing.add_dense(acts_BF, units_B)
        return (acts_BF != 0).sum(1), _l1(acts_BF)

    def add(self, piece: Piece, mean_D: Tensor) -> Tensor:
        """Reconstruct `piece` and add it to the sums (`mean_D`: ȳ at the target site); returns ŷ on the kept rows [m, d_out]."""
        y_MD, found = piece.kept(self.target), []
        for part, yhat_BD, l0_B, l1_B in self.chunks(piece):
            if yhat_BD.shape[1] != y_MD.shape[1]:
                raise StageFailed(f"{self.subject.id} gives rows of {yhat_BD.shape[1]}", why=f"{self.target} has width {y_MD.shape[1]}")
            units_B = piece.units_M[part]
            quantities, error_BD = row_quantities(y_MD[part].to(yhat_BD.device), yhat_BD, mean_D)
            self.sums.add(units_B, **quantities, l0=l0_B, l1=l1_B)
            self.sums.add_vectors(units_B, "error", error_BD)
            self.broken_rows += int((~(yhat_BD.isfinite().all(1) & l1_B.isfinite())).sum())
            found.append(yhat_BD)
        return torch.cat(found) if found else y_MD

    def count(self, piece: Piece) -> None:
        """Only count active latents on `piece`: what `mean_l0` is made of."""
        for part, _, l0_B, _ in self.chunks(piece):
            self.sums.add(piece.units_M[part], l0=l0_B, rows=np.ones(len(l0_B)))

    @property
    def mean_l0(self) -> float:
        """Mean active latents a row so far; 0 without rows."""
        return float(self.sums["l0"].sum() / max(self.sums["rows"].sum(), 1))

    def end(self) -> None:
        """After the last piece: say so if rows came out broken."""
        rows = int(self.sums["rows"].sum()) if "rows" in self.sums else 0
        if self.broken_rows and self.failure is None:
            self.failure = f"{self.broken_rows:,} of {rows:,} rows came out of the SAE with NaN or infinite numbers"

    def firing_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, sequences, last sequence) of each latent, int64 [F]."""
        counts = self.firing
        return counts.fired_F.cpu().numpy(), counts.sequences_F.cpu().numpy(), counts.last_F.cpu().numpy()


def _l1(acts_BF: Tensor) -> Tensor:
    """Σ_i |f_i| [n], in float32 at least."""
    return acts_BF.abs().sum(1, dtype=torch.promote_types(acts_BF.dtype, torch.float32))


def on_device(sae: SAE, device: torch.device) -> SAE:
    """The SAE itself if it is there already, else a copy: the caller's stays where it is."""
    where = next((parameter.device for parameter in sae.parameters()), device)
    there = where.type == device.type and (device.index is None or where.index == device.index)
    return sae if there else copy.deepcopy(sae).to(device)
