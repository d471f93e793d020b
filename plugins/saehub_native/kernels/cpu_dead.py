"""A batch's residual and a mask of dead latents in; AuxK's loss and its gradients out, as the sparse step that it is, by compiled loops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saehub_native.kernels.rank import LATENTS_A_PIECE, Ranker
from saehub_native.kernels.team import pieces

if TYPE_CHECKING:
    from saehub_native.kernels.cpu import CpuKernels, Selection
    from saehub_native.kernels.lazy import RowSums
    from saehub_native.kernels.team import Team

SPARSE_FROM = 3
"""Dead latents for each one that a row selects, from which the sparse step takes less time than dense products."""
BLOCKS_A_PIECE, WIDE_LATENTS = 16, 1024
ROWS_COPIED, LITTLE_LEFT = 128, 1e-2
ROWS_AT_ONCE = 64
"""Rows whose scores of all latents fit in cache."""


class Expected:
    """AuxK's selection among the dead latents, made of the scores that the main selection computes anyway."""

    def __init__(self, key: tuple[Any, ...], companion: CpuKernels, dead_N: Tensor, selection: Selection):
        self.key, self.companion, self.dead_N, self.selection = key, companion, dead_N, selection
        self.scale_N: Any = None
        self.complete = False

    def rows(self, start: int, stop: int, loop: Any, at: int, kind: int, scores32: Any, scores16: Any, scale_F: Any, row_scale_B: Any) -> None:
        """Call `loop(start, stop, at, kind, …)`, and select in the same rows among the dead latents, whose scores are taken while they are in cache."""
        dead32, dead16 = self.companion.ranker.room(stop - start, self.dead_N.numel())
        scores, pick = (at, kind, scores32, scores16, scale_F, row_scale_B), self.dead_N.numpy()
        for first in range(start, stop, ROWS_AT_ONCE):
            last = min(stop, first + ROWS_AT_ONCE)
            loop(first, last, *scores)
            self.companion.wide.pick_rows(first, last, *scores, pick, dead32, dead16)
        self.selection.rows(start, stop, at, kind, dead32, dead16, self.scale_N, row_scale_B)


class DeadLatents:
    """The part of `CpuKernels` for `architectures.auxk.add_auxk`.

    A companion, kernels of the same kind, selects among the dead latents: from the main selection's scores where it was told in time
    (`expect_auxk`), else from its own. What is selected does not depend on that.
    """

    lazy: bool
    ranker: Ranker
    team: Team
    loops: Any
    wide: Any
    _companion: CpuKernels | None = None
    _expected: Expected | None = None
    _held: dict[str, Tensor] | None = None

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """As the protocol says."""
        return self._buffers(**{name: tuple(shape)})[0]

    def companion(self) -> CpuKernels:
        """Kernels for the dictionary of dead latents."""
        from saehub_native.kernels.cpu import CpuKernels

        if self._companion is None:
            self._companion = CpuKernels(self.ranker.kind)
        self._companion.ranker.forget()  # its weights are others every time, in memory that may be the same
        return self._companion

    def expect_auxk(self, params: Mapping[str, Tensor], centred_BD: Tensor, dead_F: Tensor, k_aux: int, signed: bool = False) -> None:
        """`add_auxk` will be asked for the same: select among these latents along with the next selection over all."""
        from saehub_native.kernels.cpu import WIDE, Selection

        self._expected = None
        dead_N = dead_F.nonzero().squeeze(1)
        if not SPARSE_FROM * k_aux <= dead_N.numel() <= WIDE * k_aux:
            return
        companion = self.companion()
        if companion.ranker.kind == self.ranker.kind:
            W_ND, b_N = self._dead_rows(params, dead_N, "W_enc"), params["b_enc"][dead_N]
            selection = Selection(companion, centred_BD, W_ND, b_N, k_aux, "abs" if signed else "top", self._pairs(len(centred_BD), k_aux))
            self._expected = Expected(_key(centred_BD, k_aux, signed), companion, dead_N, selection)

    def begin_expected(self, ranker: Ranker) -> Expected | None:
        """What wants to see the scores that come now."""
        expected = self._expected
        if expected is None or expected.complete:
            return None
        expected.scale_N, expected.complete = ranker.low_scale_F[expected.dead_N].numpy(), True
        return expected

    def add_auxk(
        self,
        grads: dict[str, Tensor | RowSums],
        params: Mapping[str, Tensor],
        centred_BD: Tensor,
        residual_BD: Tensor,
        dead_F: Tensor,
        k_aux: int,
        alpha: float,
        signed: bool = False,
    ) -> Tensor | None:
        """α·L_aux, 0-dimensional, its gradients added to `grads`; None where so few latents are dead that dense products do as well."""
        expected, self._expected = self._expected, None
        dead_N = dead_F.nonzero().squeeze(1)
        if dead_N.numel() < SPARSE_FROM * k_aux:
            return None
        companion = self.companion()
        miss_BD, spread = self._copied(residual_BD)
        if expected is not None and expected.complete and expected.key == _key(centred_BD, k_aux, signed) and torch.equal(expected.dead_N, dead_N):
            values_BK, indices_BK = expected.selection.finish()
        else:
            dead = self._dead_rows(params, dead_N, "W_enc"), params["b_enc"][dead_N]
            values_BK, indices_BK = companion.encode_select(centred_BD, *dead, k_aux, "abs" if signed else "top")
        W_dec_ND = self._dead_rows(params, dead_N, "W_dec")
        error, g_enc_ND, g_dec_ND, g_b_N = self._gradients(miss_BD, centred_BD.contiguous(), values_BK, indices_BK, W_dec_ND, alpha / spread)
        # dead_N has no duplicates, so these indexed sums do not depend on an order.
        grads["W_enc"].index_add_(0, dead_N, g_enc_ND)
        grads["W_dec"].index_add_(0, dead_N, g_dec_ND)
        grads["b_enc"].index_add_(0, dead_N, g_b_N)
        return alpha * error / spread

    def _copied(self, residual_BD: Tensor) -> tuple[Tensor, float]:
        """A copy of the residual, and Σ|e − ē|² = Σ|e|² − B |ē|²: where little would be left of the difference, computed as it is written."""
        residual_BD = residual_BD.contiguous()
        n_rows, d = residual_BD.shape
        (miss_BD,) = self._buffers(miss_BD=(n_rows, d))
        count = -(-n_rows // ROWS_COPIED)
        sums_PD, squares = torch.empty(count, d), [0.0] * count
        e, copy, sums = residual_BD.numpy(), miss_BD.numpy(), sums_PD.numpy()

        def piece(p: int) -> None:
            squares[p] = self.loops.copy_rows(p * ROWS_COPIED, min(n_rows, (p + 1) * ROWS_COPIED), e, copy, sums[p])

        self.team.run(piece, count)
        total = math.fsum(squares)
        spread = total - float(sums_PD.double().sum(0).square().sum()) / n_rows
        if not spread > LITTLE_LEFT * total:
            spread = float((residual_BD - residual_BD.mean(0)).square_().sum())
        return miss_BD, max(spread, torch.finfo(torch.float32).tiny)

    def _gradients(
        self, residual_BD: Tensor, x_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ|e|² with e = residual − Σ v W_dec (in its place), and the gradients of weight · Σ|e|² by W_enc, W_dec and b_enc."""
        from saehub_native.kernels.cpu import WIDE

        (n_rows, width), (n, d_out), wide = indices_BK.shape, W_dec_FD.shape, self.wide
        if WIDE * width < n:  # few pairs a latent in a block of rows
            companion = self.companion()
            _, grad_BD, delta_BK, error = companion.reconstruct(residual_BD, values_BK, indices_BK, W_dec_FD, weight)
            firing = companion.group(indices_BK, n, values_BK)
            sums = ((delta_BK, x_BD), (values_BK, grad_BD), (delta_BK, x_BD.new_ones(n_rows, 1)))
            enc_FD, dec_FD, bias_F1 = (companion.latent_sums(firing, *pair) for pair in sums)
            return error, enc_FD, dec_FD, bias_F1.squeeze(1)
        tile, blocks = wide.tile_of(d_out), -(-n_rows // wide.BLOCK)
        starts = {"start_PF": (blocks, n + 1), "start_PT": (blocks, -(-n // tile) * wide.BLOCK + 1)}
        pairs = {name: (n_rows * width,) for name in ("row_N", "latent_N", "weight_N", "value_N", "delta_N")}
        first = self._buffers(**starts, **{name: pairs[name] for name in ("row_N", "latent_N")}, dtype=torch.int32)
        start_PF, start_PT, row, latent = (t.numpy() for t in first)
        names = ("weight_N", "value_N", "delta_N")
        tensors = self._buffers(
            **{name: pairs[name] for name in names}, grad_BD=(n_rows, d_out), enc_FD=(n, x_BD.shape[1]), dec_FD=(n, d_out), bias_F=(n,)
        )
        weights, values, delta, grad, *sums = (t.numpy() for t in tensors)
        index, value, W, x, residual = (t.numpy() for t in (indices_BK, values_BK, W_dec_FD, x_BD, residual_BD))
        self.team.run(lambda p: wide.arrange_block(p, index, value, tile, start_PF, row, weights, start_PT, latent, values), blocks)
        threads, error_B = torch.get_num_threads(), torch.empty(n_rows)
        rows = (W, tile, start_PT, latent, values, width, np.float32(weight), residual, grad, error_B.numpy())
        self.team.run(*pieces(wide.residual_of_blocks, blocks, max(1, min(BLOCKS_A_PIECE, blocks // (2 * threads))), rows))
        latents = (W, start_PF, row, weights, delta, width, x, grad, *sums)
        self.team.run(*pieces(wide.gradients_of_latents, n, min(WIDE_LATENTS, max(LATENTS_A_PIECE, -(-n // threads))), latents))
        return error_B.double().sum().float(), *tensors[-3:]

    def _pairs(self, n_rows: int, k_aux: int) -> tuple[Tensor, Tensor]:
        return self._buffers(values_BK=(n_rows, k_aux))[0], self._buffers(torch.int64, indices_BK=(n_rows, k_aux))[0]

    def _dead_rows(self, params: Mapping[str, Tensor], dead_N: Tensor, name: str) -> Tensor:
        (rows_ND,) = self._buffers(**{name: (dead_N.numel(), params[name].shape[1])})
        return torch.index_select(params[name], 0, dead_N, out=rows_ND)

    def _buffers(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> list[Tensor]:
        """Memory that is kept from step to step: what is freed goes back to the system, which clears it before it comes again."""
        self._held = self._held or {}
        found = []
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            if name not in self._held or self._held[name].numel() < size:
                self._held[name] = torch.empty(size, dtype=dtype)
            found.append(self._held[name][:size].view(shape))
        return found


def _key(centred_BD: Tensor, k_aux: int, signed: bool) -> tuple[Any, ...]:
    return centred_BD.data_ptr(), centred_BD._version, tuple(centred_BD.shape), k_aux, signed
