"""Two sets of unit vectors in; the one-to-one matching with the greatest total cosine, and a bound that no other can exceed, out.

    maximise Σ_i s_{i,π(i)} over one-to-one π,   s_ij = ⟨a_i, b_j⟩ (or its absolute value)

`scipy.optimize.linear_sum_assignment` holds all N × M similarities; at 131,072 latents these are 69 GB in float32 alone. Here they are
computed in blocks and forgotten: only the best candidates of every row and column are kept, as a graph. On the graph an auction with
falling ε (Bertsekas 1979) finds a matching and column prices p; shortest augmenting paths (Jonker & Volgenant 1987) make it exact. Any
prices (p ≥ 0 where M > N) bound *all* matchings, those along forgotten pairs too:

    Σ_i s_{i,π(i)} ≤ Σ_i max_j (s_ij - p_j) + Σ_j p_j

One more pass over all blocks evaluates the right-hand side, and lists the forgotten pairs that would beat it; they join the graph, and
so on until none is left. The bound minus the total is the certified gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saehub.errors import StageFailed
from saehub_native.evaluate.matching import kernels

EXACT = 2.5e11
"""Up to so many multiplications in a pass, similarities are float64; above, float32, and the gap includes their largest possible rounding."""
CHUNK = 2_000_000
"""Bids, or columns looked at, between two looks at the clock."""
FIRST_EPS, LAST_EPS, FALL = 0.05, 1e-7, 6.0
"""ε of the auction: a row overpays by at most that."""
NEW_EDGES = 16
"""Forgotten pairs that one pass may add for each row."""


@dataclass(frozen=True)
class Assignment:
    """A matching of all rows of the narrower side."""

    partner_N: np.ndarray
    """int64 [N]: the column of each row; -1 for rows without one (N > M)."""
    similarity_N: np.ndarray
    """float64 [N]: cosine (or its absolute value) with the partner; NaN without one."""
    total: float
    """Σ of the similarities, in float64."""
    bound: float
    """No matching has a greater total."""
    seconds: float
    passes: int
    """How often all similarities were looked at."""
    edges: int
    """Pairs in the graph at the end."""
    stopped: bool
    """Whether the time budget ended the search before it was exact."""

    @property
    def gap(self) -> float:
        """(bound - total) / |total|: the share by which a better matching could at most exceed this one; never negative."""
        return max(0.0, self.bound - self.total) / max(abs(self.total), 1e-300)

    @property
    def said(self) -> str:
        """One sentence about how good it is."""
        exact = self.gap < 1e-9
        words = "optimal (certified gap 0)" if exact else f"certified gap {100 * self.gap:.2g} %"
        return f"{words}{', stopped by the time budget' if self.stopped else ''}"


def assign(
    a_ND: Tensor,
    b_MD: Tensor,
    *,
    absolute: bool = False,
    candidates: int = 32,
    seconds: float | None = None,
    gap: float = 0.0,
    memory: int = 2 << 30,
    tell: Callable[[str], None] = lambda text: None,
) -> Assignment:
    """Match the rows of `a_ND` with those of `b_MD` (both are scaled to norm 1; zero rows stay zero), as well as possible.

    Args:
        absolute: maximise |cosine|.
        candidates: pairs kept for each row and each column at first.
        seconds: budget of the search; the pass that certifies the result is made even if it ends a little later. None: until exact.
        gap: be content with this certified relative gap.
        memory: bytes for similarities; where all of them fit, they are computed once.
        tell: gets a line now and then.

    Raises:
        StageFailed: a row is not finite, or the widths differ.
    """
    if a_ND.shape[1] != b_MD.shape[1]:
        raise StageFailed(f"vectors of {a_ND.shape[1]} and of {b_MD.shape[1]} numbers cannot be matched", fix="SAEs of the same site")
    for rows in (a_ND, b_MD):
        if not bool(rows.isfinite().all()):
            raise StageFailed("a dictionary with values that are not finite cannot be matched")
    if a_ND.shape[0] > b_MD.shape[0]:
        other = assign(b_MD, a_ND, absolute=absolute, candidates=candidates, seconds=seconds, gap=gap, memory=memory, tell=tell)
        partner_N, similarity_N = np.full(a_ND.shape[0], -1, np.int64), np.full(a_ND.shape[0], np.nan)
        partner_N[other.partner_N] = np.arange(b_MD.shape[0])
        similarity_N[other.partner_N] = other.similarity_N
        return Assignment(partner_N, similarity_N, other.total, other.bound, other.seconds, other.passes, other.edges, other.stopped)
    return _Search(a_ND, b_MD, absolute, candidates, seconds, gap, memory, tell).run()


def unit(x_ND: Tensor) -> Tensor:
    """Rows of norm 1; zero rows stay zero."""
    return x_ND / x_ND.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x_ND.dtype).tiny)


class _Search:
    def __init__(self, a_ND: Tensor, b_MD: Tensor, absolute: bool, candidates: int, seconds: float | None, gap: float, memory: int, tell):
        self.N, self.M, self.D = a_ND.shape[0], b_MD.shape[0], a_ND.shape[1]
        self.absolute, self.K, self.gap, self.memory, self.tell = absolute, max(1, min(candidates, self.M)), gap, memory, tell
        fine = self.N * self.M * self.D <= EXACT and a_ND.device.type != "mps"
        self.dtype = torch.float64 if fine else torch.float32
        # γ_D = D·u of a product of unit vectors, whatever the order of its sum (Higham, Accuracy and Stability, §3.1); twice, for their own rounding.
        self.rounding = 2 * (self.D + 2) * (2.0**-53 if fine else 2.0**-24)
        self.a_ND, self.b_MD = unit(a_ND.detach().double()).to(self.dtype), unit(b_MD.detach().double()).to(self.dtype)
        self.seconds, self.begun = seconds, time.monotonic()
        self.pass_seconds, self.passes = 0.0, 0
        self.price_M = np.zeros(self.M)
        self.col_of_N, self.row_of_M = np.full(self.N, -1, np.int64), np.full(self.M, -1, np.int64)
        self.worth_N = np.zeros(self.N)
        self.stopped = False
        self._kept: dict[int, np.ndarray] = {}
        """First row -> block, where all of them fit into `memory`."""

    # ------------------------------------------------------------------ similarities
    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, similarities [b, M]) of all rows."""
        begun = time.monotonic()
        step = max(1, self.memory // (4 * self.M * self.a_ND.itemsize))
        whole = self.N * self.M * self.a_ND.itemsize <= self.memory
        for first in range(0, self.N, step):
            s_BM = self._kept.get(first)
            if s_BM is None:
                s_BM = self.a_ND[first : first + step] @ self.b_MD.T
                s_BM = (s_BM.abs_() if self.absolute else s_BM).cpu().numpy()
                if whole:
                    self._kept[first] = s_BM
            yield first, s_BM
        self.passes += 1
        self.pass_seconds = time.monotonic() - begun

    def _similarity(self, row_E: np.ndarray, col_E: np.ndarray) -> np.ndarray:
        """float64 similarities of single pairs."""
        found = np.empty(len(row_E))
        step = max(1, self.memory // (32 * self.D))
        for at in range(0, len(row_E), step):
            i, j = (torch.from_numpy(x[at : at + step]).to(self.a_ND.device) for x in (row_E, col_E))
            found[at : at + step] = (self.a_ND[i].double() * self.b_MD[j].double()).sum(1).cpu().numpy()
        return np.abs(found) if self.absolute else found

    def _late(self, share: float = 1.0) -> bool:
        """Whether the budget, less the certifying pass that must follow, is used up."""
        return self.seconds is not None and time.monotonic() - self.begun + self.pass_seconds > share * self.seconds

    # ------------------------------------------------------------------ the graph
    def _candidates(self) -> None:
        """The K best of each row and of each column, and one whole matching, so that the graph has one."""
        K = self.K
        row_w_NK, row_col_NK = np.full((self.N, K), -np.inf), np.zeros((self.N, K), np.int32)
        col_w_MK, col_row_MK = np.full((self.M, K), -np.inf), np.zeros((self.M, K), np.int32)
        col_low_M = np.full(self.M, -np.inf)
        for first, s_BM in self._blocks():
            kernels.keep_best(s_BM, first, row_w_NK, row_col_NK, col_w_MK, col_row_MK, col_low_M)
            self.tell(f"candidates of {first + len(s_BM):,} of {self.N:,} latents")
        row_E = np.concatenate([np.repeat(np.arange(self.N), K), col_row_MK.ravel().astype(np.int64)])
        col_E = np.concatenate([row_col_NK.ravel().astype(np.int64), np.repeat(np.arange(self.M), K)])
        w_E = np.concatenate([row_w_NK.ravel(), col_w_MK.ravel()])
        some = np.isfinite(w_E)
        self._build(row_E[some], col_E[some], w_E[some])
        self._fill()

    def _build(self, row_E: np.ndarray, col_E: np.ndarray, w_E: np.ndarray) -> None:
        """The graph in CSR form, each pair once."""
        key_E, first_E = np.unique(row_E * self.M + col_E, return_index=True)
        self.row_E, self.cols_E, self.w_E = key_E // self.M, (key_E % self.M).astype(np.int32), np.ascontiguousarray(w_E[first_E], dtype=np.float64)
        self.start_N1 = np.zeros(self.N + 1, np.int64)
        np.cumsum(np.bincount(self.row_E, minlength=self.N), out=self.start_N1[1:])

    def _more(self, row_E: np.ndarray, col_E: np.ndarray, w_E: np.ndarray) -> None:
        self._build(np.concatenate([self.row_E, row_E]), np.concatenate([self.cols_E.astype(np.int64), col_E]), np.concatenate([self.w_E, w_E]))

    def _fill(self) -> None:
        """Give rows that are still free the best free column of the graph, or else any, and put such pairs into the graph."""
        if (self.col_of_N < 0).any():
            kernels.greedy(np.argsort(-self.w_E, kind="stable"), self.row_E, self.cols_E, self.col_of_N, self.row_of_M)
        rows = np.flatnonzero(self.col_of_N < 0)
        if len(rows) == 0:
            return
        cols = np.flatnonzero(self.row_of_M < 0)[: len(rows)]
        self.col_of_N[rows], self.row_of_M[cols] = cols, rows
        self._more(rows, cols, self._similarity(rows, cols))

    # ------------------------------------------------------------------ solving on the graph
    @property
    def _graph(self) -> tuple:
        return self.start_N1, self.cols_E, self.w_E

    def _auction(self) -> None:
        """Prices and a matching within N·ε of the graph's best, ε falling: for as many columns as rows (others must keep price 0)."""
        eps = FIRST_EPS
        while eps > LAST_EPS and not self._late(0.7):
            kernels.worth(*self._graph, self.price_M, self.worth_N)
            kernels.release(*self._graph, self.price_M, self.worth_N, self.col_of_N, self.row_of_M, eps)
            stack_N = np.empty(self.N, np.int64)
            free = np.flatnonzero(self.col_of_N < 0)
            stack_N[: len(free)] = free
            left = len(free)
            while left and not self._late(0.7):
                left, _ = kernels.bid(*self._graph, self.price_M, self.col_of_N, self.row_of_M, stack_N, left, eps, CHUNK)
            self.tell(f"auction with ε = {eps:.1g}")
            eps /= FALL

    def _paths(self) -> None:
        """Make the matching exact on the graph, at prices under which no pair costs its row anything; too late for that, leave it as it is."""
        if self._late():
            return
        kernels.worth(*self._graph, self.price_M, self.worth_N)
        free = kernels.release(*self._graph, self.price_M, self.worth_N, self.col_of_N, self.row_of_M, 0.0)
        self.tell(f"augmenting paths for {free:,} latents")
        dist_M, from_M = np.full(self.M, np.inf), np.zeros(self.M, np.int64)
        place_M, heap_M, seen_M = np.full(self.M, -1, np.int64), np.zeros(self.M, np.int64), np.zeros(self.M, np.int64)
        at = 0
        while 0 <= at < self.N and not self._late():
            scratch = (dist_M, from_M, place_M, heap_M, seen_M)
            at = kernels.augment(*self._graph, self.price_M, self.worth_N, self.col_of_N, self.row_of_M, *scratch, at, CHUNK)
        if at < 0:
            raise StageFailed("the graph of candidates holds no matching", why="a fault in saehub, not in your SAEs")

    # ------------------------------------------------------------------ certificate
    def _certify(self) -> tuple[float, int]:
        """(bound on every matching, pairs that were added) from one pass over all similarities."""
        kernels.worth(*self._graph, self.price_M, self.worth_N)
        best_N = np.empty(self.N)
        row_E, col_E, w_E = [], [], []
        for first, s_BM in self._blocks():
            most = NEW_EDGES * len(s_BM)
            rows, cols, w = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)
            n = kernels.look(s_BM, first, self.price_M, self.worth_N, 2 * self.rounding, best_N, rows, cols, w, NEW_EDGES)
            row_E.append(rows[:n]), col_E.append(cols[:n]), w_E.append(w[:n])
            self.tell(f"certifying {first + len(s_BM):,} of {self.N:,} latents")
        rows, cols, w = np.concatenate(row_E), np.concatenate(col_E), np.concatenate(w_E)
        if len(rows):
            self._more(rows, cols, w)
        bound = math.fsum(best_N) + math.fsum(self.price_M) + self.N * self.rounding
        return bound, len(rows)

    def run(self) -> Assignment:
        self._candidates()
        square = self.N == self.M
        if square:
            self._auction()
        bound, total, matched = math.inf, -math.inf, self.col_of_N.copy()
        while True:
            if not square:  # columns that stay free must keep price 0, so each round begins anew
                self.price_M[:], self.col_of_N[:], self.row_of_M[:] = 0.0, -1, -1
            self._paths()
            self._fill()
            now = math.fsum(self._similarity(np.arange(self.N), self.col_of_N))
            if now > total:
                total, matched = now, self.col_of_N.copy()
            found, added = self._certify()
            bound = min(bound, found)
            reached = bound - total <= max(self.gap, 1e-12) * abs(total)
            self.tell(f"total {total:.6g}, bound {bound:.6g}, {added:,} pairs added")
            if reached or not added:
                break
            if self._late():
                self.stopped = True
                break
        self.stopped = self.stopped or (self.seconds is not None and not reached and time.monotonic() - self.begun >= self.seconds)
        similarity_N = self._similarity(np.arange(self.N), matched)
        seconds = time.monotonic() - self.begun
        return Assignment(matched, similarity_N, total, max(bound, total), seconds, self.passes, len(self.w_E), self.stopped)
