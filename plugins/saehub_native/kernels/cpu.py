"""Rows, weights and k in; the float32 selection, reconstructions and gradients out, several times faster than plain torch on a CPU.

Selection. A cheap product ranks the latents (rank.py); k + r candidates are at hand, of which the k best by score are computed in float32
first, then all whose score is above v_k − `GUARD` ρ, where v_k is the k-th exact value and ρ the root mean square of the errors of the scores
computed so far. Only a latent whose score is wrong by more than that could be missed. Where k + r candidates do not reach so far down, the
row's candidates are doubled; where that happens to many rows, r is doubled for the batches to come. So r sets the work, not the result; and
every `AUDIT_EVERY` selections some rows are compared with float64, a miss doubles r, and beyond `R_MAX` the next more precise product takes
over. Selected latents come in ascending order and every value is computed in the same way, so what follows does not depend on the scores.

Gradients. A weight's gradient is never held whole: `latent_sums` returns `RowSums`, and `update` forms a latent's row from its pairs, projects
it, and takes the Adam step while the row is in cache.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saehub.seeds import generator
from saehub_native.kernels import Firing
from saehub_native.kernels.audit import missed_rows
from saehub_native.kernels.cpu_dead import DeadLatents
from saehub_native.kernels.lazy import Part, RowSums
from saehub_native.kernels.rank import KINDS, LATENTS_A_PIECE, ROWS_A_PIECE, Ranker, best_kind
from saehub_native.kernels.reference import ReferenceKernels
from saehub_native.kernels.scanning import rank
from saehub_native.kernels.team import Team, pieces

if TYPE_CHECKING:
    from saehub_native.optim import Adam

R_START, R_MAX = 16, 256
GUARD = 6.0
AUDIT_EVERY, AUDIT_ROWS = 100, 8
AGAIN_SHARE = 32
"""More than one row in so many that needs further candidates, and r is doubled for the batches to come."""
WIDE = 24
"""Where a row selects at least one in so many latents, the loops of cpu_wide.py take less time."""
SCAN_PLACES = 8
"""Latents for each one that a row may select over a batch, from which a scan takes less time than a product that returns all scores."""
GROUPING_PIECES = 8
TINY = 1e-12
NO_COPIES = (0, np.ones(1, np.float32), np.empty((1, 1), np.int16), np.empty((1, 1), np.int8), np.ones(1, np.float32))


class Selection:
    """One selection while the scores come in, a chunk of rows after the other; `out`: where its values and latents are to be written."""

    def __init__(
        self, kernels: CpuKernels, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: str, out: tuple[Tensor, Tensor] | None = None
    ):
        n_rows, (n_latents, _) = len(x_BD), W_enc_FD.shape
        self.kernels, self.rule, self.inputs = kernels, rule, (x_BD, W_enc_FD, b_enc_F, k)
        self.wide = WIDE * k >= n_latents
        self.values_BK, self.indices_BK = out or (torch.empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.int64))
        self.exact_B, self.again_B = torch.zeros(2, n_rows, dtype=torch.int32)

    def rows(self, *scores: Any) -> None:
        """Select in the rows of a chunk; `scores` as `CpuKernels._scored` passes them."""
        kernels, (x_BD, W_enc_FD, b_enc_F, k) = self.kernels, self.inputs
        inputs = (x_BD.numpy(), W_enc_FD.numpy(), b_enc_F.numpy(), k)
        out = (self.indices_BK.numpy(), self.values_BK.numpy(), self.exact_B.numpy())
        if self.rule == "group":
            kernels.choosing.group_rows(*scores, *inputs, GUARD, *out)
            return
        arguments = (*inputs, kernels.r, GUARD, *out, self.again_B.numpy())
        if self.wide:
            kernels.wide.select_wide_rows(*scores, self.rule == "abs", *arguments)
        else:
            kernels.choosing.select_rows(*scores, self.rule == "abs", *arguments)

    def scans(self) -> bool:
        """Whether `scanned` takes less time than `rows`."""
        scanner, (_, W_enc_FD, _, k) = self.kernels.ranker.scanner, self.inputs
        return scanner is not None and not self.wide and self.rule in ("top", "abs") and scanner.suits(len(W_enc_FD), k + self.kernels.r)

    def places(self) -> int:
        """Candidates of a row that `scanned` keeps."""
        _, W_enc_FD, _, k = self.inputs
        return self.kernels.ranker.scanner.places(len(W_enc_FD), k + self.kernels.r)

    def scanned(self, start: int, stop: int, *low: Any) -> None:
        """Select in the rows of a chunk; `low`: rows, their scales, tiles and latents' scales."""
        kernels, (x_BD, W_enc_FD, b_enc_F, k) = self.kernels, self.inputs
        scanner, n = kernels.ranker.scanner, len(W_enc_FD)
        tensors = (self.indices_BK, self.values_BK, self.exact_B, self.again_B)
        kernels.scanning.select_scanned_rows(
            start, stop, *low, rank(k + kernels.r, scanner.sample(n), n), *scanner.room(stop - start, self.places()), self.rule == "abs",
            x_BD.numpy(), W_enc_FD.numpy(), b_enc_F.numpy(), k, kernels.r, GUARD, *(t.numpy() for t in tensors),
        )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor]:
        """Values and latents of all rows."""
        kernels, n_rows = self.kernels, len(self.exact_B)
        if AGAIN_SHARE * int(self.again_B.count_nonzero()) > n_rows:
            kernels.r = min(R_MAX, 2 * kernels.r)
        kernels.exact_a_row = float(self.exact_B.sum()) / max(1, n_rows)
        x_BD, W_enc_FD, b_enc_F, k = self.inputs
        if kernels.audit_due():
            kernels.audit(x_BD, W_enc_FD, b_enc_F, self.values_BK, self.indices_BK, k, self.rule)
        return self.values_BK, self.indices_BK


class CpuKernels(DeadLatents, ReferenceKernels):
    """Implements `saehub_native.kernels.Kernels` with compiled loops (numba) and a low-precision ranking product.

    Args:
        kind: `int8`, `bfloat16` or `float32`; None: what the processor multiplies fastest.
    """

    name = "cpu"

    def __init__(self, kind: str | None = None):
        super().__init__()
        from saehub_native.kernels import cpu_loops, cpu_scan, cpu_select, cpu_wide

        self.loops, self.choosing, self.scanning, self.wide, self.team = cpu_loops, cpu_select, cpu_scan, cpu_wide, Team()
        self.ranker = Ranker(kind or best_kind(), cpu_loops, self.team)
        self.r, self.selections, self.audited, self.missed = R_START, 0, 0, 0
        self.exact_a_row = 0.0
        """Values computed exactly in a row of the last batch, on average."""
        self._low: float | None = None  # guesses for the next batch of `encode_select_batch`: they change the time, not the result
        self._places = 0

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """What a resumed training needs to go the same way: the ranking product and its smoothing, r, and where the audit stands."""
        smooth = [] if self.ranker.smooth_D is None else self.ranker.smooth_D.tolist()
        counts = {name: getattr(self, name) for name in ("r", "selections", "audited", "missed", "fullest")}
        companion = {"companion": self._companion.state()} if self._companion is not None else {}
        return {"rank": self.ranker.kind, "smooth": smooth, **counts, **companion}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.ranker = Ranker(state["rank"], self.loops, self.team)
        self.ranker.smooth_D = torch.tensor(state["smooth"]) if state["smooth"] else None
        for name in ("r", "selections", "audited", "missed", "fullest"):
            setattr(self, name, int(state[name]))
        self._companion = None
        if "companion" in state:
            self.companion().load_state(state["companion"])

    def cautions(self) -> list[str]:
        """What the audit found."""
        found = [] if self._companion is None else [f"AuxK: {caution}" for caution in self._companion.cautions()]
        if not self.missed:
            return found
        return [
            *found,
            f"the audit found {self.missed} of {self.audited:,} rows whose selection was not the float32 one; "
            f"candidates a row were raised to k + {self.r}, ranked in {self.ranker.kind}",
        ]

    # ------------------------------------------------------------------ selection
    def encode_select(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: str = "top") -> tuple[Tensor, Tensor]:
        selection = Selection(self, x_BD.contiguous(), W_enc_FD, b_enc_F, k, rule)
        x_BD = x_BD.contiguous()
        if self._expected is None and selection.scans():  # who expects AuxK wants to see all scores
            self._scanned(x_BD, W_enc_FD, selection.places(), selection.scanned)
        else:
            self._scored(x_BD, W_enc_FD, selection.rows)
        return selection.finish()

    def _scanned(self, x_BD: Tensor, W_enc_FD: Tensor, places: int, loop: Any) -> None:
        """Call `loop(start, stop, int8 rows, their scales, tiles of weights, latent scales)` over all rows, a chunk at a time."""
        ranker, scanner, n_rows = self.ranker, self.ranker.scanner, x_BD.shape[0]
        ranker.prepare(x_BD, W_enc_FD)
        low_BD, scale_B = ranker.rows(x_BD)
        low = scanner.rows(low_BD), scale_B.numpy(), scanner.tiles(ranker), ranker.low_scale_F.numpy()
        chunk = scanner.chunk(n_rows, places)
        self.team.run(lambda i: loop(i * chunk, min(n_rows, (i + 1) * chunk), *low), -(-n_rows // chunk))

    def _scored(self, x_BD: Tensor, W_enc_FD: Tensor, loop: Any) -> None:
        """Call `loop(start, stop, at, kind, scores32, scores16, latent scales, row scales)` over all rows, a chunk of scores at a time."""
        ranker, n_rows = self.ranker, x_BD.shape[0]
        ranker.prepare(x_BD, W_enc_FD)
        low_BD, scale_B = ranker.rows(x_BD)
        scales = ranker.low_scale_F.numpy(), scale_B.numpy()
        chunk = ranker.chunk(n_rows, W_enc_FD.shape[0])

        expected = self.begin_expected(ranker)

        def piece(i: int) -> None:  # one thread multiplies and reads what it got
            at, stop = i * chunk, min(n_rows, (i + 1) * chunk)
            scores = (at, ranker.code, *ranker.scores(low_BD[at:stop], W_enc_FD), *scales)
            if expected is None:
                loop(at, stop, *scores)
            else:
                expected.rows(at, stop, loop, *scores)

        self.team.run(piece, -(-n_rows // chunk))

    # ------------------------------------------------------------------ selection over a batch
    def encode_select_batch(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As the protocol says. T is the k·B-th largest score; all latents with a score within δ_b of T are computed exactly, and the k·B
        largest exact values are the selection. δ_b = GUARD · ρ · u_b, with u_b = |x_b| + its quantum times √d, and ρ the root mean square of
        (value − score)/u over the scores that reach T."""
        x_BD, n_rows, n_latents = x_BD.contiguous(), x_BD.shape[0], W_enc_FD.shape[0]
        wanted, norm_B = k * n_rows, x_BD.norm(dim=1)
        if 8 * k >= n_latents or not bool(norm_B.isfinite().all()):
            return super().encode_select_batch(x_BD, W_enc_FD, b_enc_F, k)
        x, W, b = x_BD.numpy(), W_enc_FD.numpy(), b_enc_F.numpy()
        row_pieces = lambda loop, *arrays: self.team.run(*pieces(loop, n_rows, ROWS_A_PIECE, arrays))  # noqa: E731
        while True:
            if self._low is None:
                self._low = self._first_low(x_BD, W_enc_FD, b_enc_F, k)
            low, places = self._low, max(self._places, 4 * k)
            count_B = torch.zeros(n_rows, dtype=torch.int32)
            (index,) = (t.numpy() for t in self._buffers(torch.int32, batch_index_BM=(n_rows, places)))
            score, value = (t.numpy() for t in self._buffers(batch_score_BM=(n_rows, places), batch_value_BM=(n_rows, places)))
            count = count_B.numpy()
            self._collected(x_BD, W_enc_FD, b, low, index, score, count)
            if int(count_B.max()) > places:
                self._places = min(n_latents, 2 * places)
                continue
            bar, found = self._kth_largest(score, count, wanted, False)
            if found < wanted and low > 0:
                self._low = 0.5 * low if low > 1e-6 * float(W_enc_FD.abs().max()) else -abs(low) - 1e-6
                continue
            bar = max(bar, 0.0) if found >= wanted else 0.0
            error_B, exact_B = torch.zeros(n_rows), torch.zeros(n_rows, dtype=torch.int32)
            unit_B = norm_B + (self.ranker.rows(x_BD)[1] * x_BD.shape[1] ** 0.5 if self.ranker.kind == "int8" else 0.0) + 1e-30
            both = (value, unit_B.numpy(), error_B.numpy(), exact_B.numpy())
            inputs = (x, W, b, index, score, count)
            row_pieces(self.choosing.exact_rows, *inputs, np.full(n_rows, bar, np.float32), np.float32(math.inf), True, *both)
            rms = math.sqrt(float(error_B.double().sum()) / max(1, int(exact_B.sum())))
            reach_B = (bar - GUARD * rms * unit_B).float()
            lowest = float(reach_B.min())
            if lowest < low:
                self._low = lowest - 0.5 * (bar - lowest)
                continue
            self._low = lowest - 0.5 * (bar - lowest)  # where the next batch begins to collect: it changes the time, not the result
            row_pieces(self.choosing.exact_rows, *inputs, reach_B.numpy(), np.float32(bar), False, *both)
            break
        cut, found = self._kth_largest(value, count, wanted, True)
        cut = cut if found >= wanted else 0.0
        fullest = max(1, self.choosing.fullest_row(0, n_rows, np.float32(cut), value, count))
        values_BK, indices_BK = torch.empty(n_rows, fullest), torch.empty(n_rows, fullest, dtype=torch.int64)
        row_pieces(self.choosing.pack_rows, np.float32(cut), index, value, count, indices_BK.numpy(), values_BK.numpy())
        self.exact_a_row = float(exact_B.sum()) / n_rows
        if self.audit_due():
            self.audit(x_BD, W_enc_FD, b_enc_F, values_BK, indices_BK, k, "batch", cut)
        return values_BK, indices_BK

    def _kth_largest(self, value_BM: Any, count_B: Any, k: int, positive: bool) -> tuple[float, int]:
        """The k-th largest of the first count_B[b] values of all rows (of those above 0 if `positive`; the smallest where there are fewer), and their number."""
        n_rows, bins = len(count_B), 1 << self.choosing.BINS
        prefix, number = 0, 0
        for shift in (2 * self.choosing.BINS, self.choosing.BINS, 0):
            histograms = np.zeros((-(-n_rows // (8 * ROWS_A_PIECE)), bins), np.int64)
            ways = (value_BM, count_B, positive, prefix, shift)
            self.team.run(
                lambda p: self.choosing.histogram_rows(8 * ROWS_A_PIECE * p, min(n_rows, 8 * ROWS_A_PIECE * (p + 1)), *ways, histograms[p]),  # noqa: B023
                len(histograms),
            )
            above = histograms.sum(0)[::-1].cumsum()
            if shift == 2 * self.choosing.BINS:
                number, k = int(above[-1]), min(k, int(above[-1]))
                if number == 0:
                    return 0.0, 0
            place = int(np.searchsorted(above, k))
            k -= int(above[place - 1]) if place else 0
            prefix |= (bins - 1 - place) << shift
        key = prefix - (1 << 31)
        return float(np.array(key ^ ((key >> 31) & 0x7FFFFFFF), np.int32).view(np.float32)), number

    def _collected(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Any, low: float, index_BM: Any, score_BM: Any, count_B: Any) -> None:
        """What `collect_rows` says, over all rows."""
        scanner, (n, places) = self.ranker.scanner, (len(W_enc_FD), index_BM.shape[1])
        if scanner is None or not scanner.there or self._expected is not None or SCAN_PLACES * places > n:
            self._scored(x_BD, W_enc_FD, lambda *scores: self.choosing.collect_rows(*scores, b_enc_F, np.float32(low), index_BM, score_BM, count_B))
            return

        def piece(start: int, stop: int, *scores: Any) -> None:
            bound_R, *rest = scanner.room(stop - start, places)
            bound_R[:] = low
            self.scanning.collect_scanned_rows(start, stop, *scores, bound_R, *rest, b_enc_F, index_BM, score_BM, count_B)

        self._scanned(x_BD, W_enc_FD, places, piece)

    def _first_low(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> float:
        """A score to collect from, for a first batch: what 2k scores a row of some rows reach."""
        scores_SF = torch.addmm(b_enc_F, x_BD[:64], W_enc_FD.t())
        kth = torch.kthvalue(scores_SF.flatten(), scores_SF.numel() - min(scores_SF.numel() - 1, 2 * k * len(scores_SF))).values
        return float(kth)

    # ------------------------------------------------------------------ audit
    def audit_due(self) -> bool:
        self.selections += 1
        return self.selections % AUDIT_EVERY == 1 or AUDIT_EVERY == 1

    def audit(
        self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, values_BK: Tensor, indices_BK: Tensor, k: int, rule: str, cut: float = 0.0
    ) -> None:
        """Compare some rows, drawn from the number of the selection, with float64; raise r, or the precision, after a miss."""
        n_rows = x_BD.shape[0]
        rows_A = torch.randperm(n_rows, generator=generator("audit", self.selections))[:AUDIT_ROWS]
        missed = missed_rows(x_BD[rows_A], W_enc_FD, b_enc_F, values_BK[rows_A], indices_BK[rows_A], k, rule, cut)
        self.audited += len(rows_A)
        if bool(missed.any()) and bool(x_BD.isfinite().all()):
            self.missed += int(missed.sum())
            self.r *= 2
            if self.r > R_MAX and self.ranker.kind != KINDS[0]:
                self.r = R_START
                self.ranker = Ranker(KINDS[KINDS.index(self.ranker.kind) - 1], self.loops, self.team)

    # ------------------------------------------------------------------ reconstruction
    def reconstruct(
        self, target_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n_rows = target_BD.shape[0]
        residual_BD, error_B = target_BD, torch.empty(n_rows)
        grad_BD, delta_BK = self._buffers(outer_BD=tuple(target_BD.shape), delta_BK=tuple(values_BK.shape))
        arguments = (target_BD, indices_BK, values_BK, W_dec_FD)
        out = (residual_BD, grad_BD, delta_BK, error_B)
        arrays = (*(t.numpy() for t in arguments), np.float32(weight), *(t.numpy() for t in out))
        self.team.run(*pieces(self.loops.reconstruct_rows, n_rows, ROWS_A_PIECE, arrays))
        return residual_BD, grad_BD, delta_BK, error_B.double().sum().float()

    # ------------------------------------------------------------------ sums over latents
    def group(self, indices_BK: Tensor, n_latents: int, values_BK: Tensor | None = None) -> Firing:
        offsets_F = torch.empty(n_latents + 1, dtype=torch.int64)
        order_N, rows_N = (torch.empty(indices_BK.numel(), dtype=torch.int64) for _ in range(2))
        active = torch.ones_like(indices_BK, dtype=torch.float32) if values_BK is None else values_BK
        index, value, offset, row, place = (t.numpy() for t in (indices_BK.reshape(-1), active.reshape(-1), offsets_F, rows_N, order_N))
        n_rows, width = indices_BK.shape
        count = min(GROUPING_PIECES, max(1, index.size // (16 * n_latents)))
        size = -(-n_rows // count) * width
        next_PF = torch.empty(count, n_latents, dtype=torch.int64).numpy()
        here = lambda p: (p * size, min(index.size, (p + 1) * size), index, value)  # noqa: E731
        self.team.run(lambda p: self.loops.count_piece(*here(p), next_PF[p]), count)
        self.loops.start_pieces(next_PF, offset)
        self.team.run(lambda p: self.loops.place_piece(*here(p), width, next_PF[p], row, place), count)
        return Firing(order_N, rows_N, offsets_F, offsets_F.diff())

    def latent_sums(self, firing: Firing, weights_BK: Tensor, source_BD: Tensor) -> Tensor | RowSums:
        n_latents, source_BD = firing.counts_F.numel(), source_BD.contiguous()
        if source_BD.shape[1] == 1:
            out_F1 = torch.empty(n_latents, 1)
            tensors = (firing.offsets_F, firing.rows_N, firing.order_N, weights_BK.reshape(-1), source_BD, out_F1)
            self.team.run(*pieces(self.loops.sum_numbers, n_latents, LATENTS_A_PIECE, tuple(t.numpy() for t in tensors)))
            return out_F1
        sums = RowSums(self, [Part(firing, weights_BK.reshape(-1), source_BD, n_latents)])
        return sums if self.lazy else sums.dense()

    def _each_part(self, sums: RowSums, size: int) -> list[tuple[int, int, tuple[Any, ...], Any]]:
        """Pieces of at most `size` latents: (first latent, first within its part, last + 1 within it, what the loops call the pairs, the part)."""
        found, before = [], 0
        for part in sums.parts:
            firing = part.firing
            arrays = tuple(t.numpy() for t in (firing.offsets_F, firing.rows_N, firing.order_N, part.weights_N, part.source_BD))
            for start in range(0, part.n_latents, size):
                found.append((before, start, min(part.n_latents, start + size), arrays, part))
            before += part.n_latents
        return found

    def dense_gradient(self, sums: RowSums, weight_FD: Tensor | None) -> Tensor:
        """The [F, d] tensor of a gradient."""
        if sums.sphere and weight_FD is None:
            raise ValueError("a projected gradient needs its weight")
        out_FD = torch.empty(sums.shape)
        self._sum(sums, weight_FD if sums.sphere else out_FD, out_FD)
        return out_FD.mul_(sums.factor)

    def square(self, sums: RowSums, weight_FD: Tensor) -> float:
        """Σ of the squares of a gradient, without holding it."""
        return self._sum(sums, weight_FD, torch.empty(0, sums.shape[1]))

    def _sum(self, sums: RowSums, weight_FD: Tensor, out_FD: Tensor) -> float:
        slots, extra = sums.slots_F().numpy(), _extra(sums)
        ranges = self._each_part(sums, LATENTS_A_PIECE)
        squares = [0.0] * len(ranges)
        weight, out = weight_FD.numpy(), out_FD.numpy()

        def piece(i: int) -> None:
            before, start, stop, arrays, part = ranges[i]
            here = slice(before, before + part.n_latents)
            squares[i] = self.loops.sum_latents(start, stop, *arrays, slots[here], extra, sums.sphere, weight[here], out[here])

        self.team.run(piece, len(ranges))
        return sums.factor**2 * math.fsum(squares)

    def square_bound(self, sums: RowSums) -> float:
        """At least `square`, in a small share of its time: |Σ w s| ≤ Σ |w| |s|, and projecting shortens."""
        norms: dict[int, Any] = {}
        for part in sums.parts:
            if id(part.source_BD) not in norms:
                norm_B = torch.empty(part.source_BD.shape[0])
                self.team.run(*pieces(self.loops.row_norms, len(norm_B), 4 * ROWS_A_PIECE, (part.source_BD.numpy(), norm_B.numpy())))
                norms[id(part.source_BD)] = norm_B.numpy()
        slots, extra_norms = sums.slots_F().numpy(), torch.from_numpy(_extra(sums)).norm(dim=1).numpy()
        ranges = self._each_part(sums, 8 * LATENTS_A_PIECE)
        squares = [0.0] * len(ranges)

        def piece(i: int) -> None:
            before, start, stop, arrays, part = ranges[i]
            here = slice(before, before + part.n_latents)
            squares[i] = self.loops.bound_latents(start, stop, *arrays[:4], norms[id(part.source_BD)], slots[here], extra_norms)

        self.team.run(piece, len(ranges))
        total = math.fsum(squares)
        return sums.factor**2 * total * (1 + 1e-4)  # room for the rounding of the sums on both sides

    # ------------------------------------------------------------------ update
    def update(self, optimizer: Adam, name: str, sums: RowSums, size: float, spread: float) -> None:
        """One Adam step of the weight `name`, in place: what `Adam.step` does with a tensor. Low-precision copies follow."""
        W_FD, m_FD, v_FD = optimizer.params[name], optimizer.m[name], optimizer.v[name]
        ranked = self.ranker.fresh(W_FD)
        code, smooth, low16, low8, scale = self.ranker.copies() if ranked else NO_COPIES
        beta1, beta2 = optimizer.betas
        numbers = tuple(np.float32(v) for v in (sums.factor, 1 - beta1, beta2, 1 - beta2, size, spread, optimizer.eps))
        slots, extra = sums.slots_F().numpy(), _extra(sums)
        weights = tuple(t.numpy() for t in (W_FD, m_FD, v_FD))
        ranges = self._each_part(sums, LATENTS_A_PIECE)

        def piece(i: int) -> None:
            before, start, stop, arrays, part = ranges[i]
            here = slice(before, before + part.n_latents)
            copies = (code, smooth, *(a[here] if a.shape[0] > 1 else a for a in (low16, low8, scale)))
            self.loops.update_latents(
                start, stop, *arrays, slots[here], extra, sums.sphere, np.float32(TINY), *(w[here] for w in weights), *numbers, *copies
            )

        self.team.run(piece, len(ranges))
        for tensor in (W_FD, m_FD, v_FD):  # the loops write past torch's sight
            torch.autograd.graph.increment_version(tensor)
        if ranked:
            self.ranker.kept(W_FD)


def _extra(sums: RowSums) -> Any:
    return (torch.empty(1, sums.shape[1]) if sums.extra is None else sums.extra[1]).numpy()
