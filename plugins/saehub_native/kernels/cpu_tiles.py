"""Rows, weights and pairs in, many pairs a row; selections, residuals and sums over latents out, a tile at a time: compiled loops.

Where a row selects a good part of all latents (AuxK among the dead ones), its rows of weights come from memory again and again. Here a tile
of latents stays in the second cache while some rows pass by it, or a block of rows while all latents do. Every function's result for one row
or latent depends on nothing outside it.
"""

from __future__ import annotations

import numpy as np

from saehub_native.kernels.cpu_arithmetic import ascending, dot, dots, jit, weighted_sum
from saehub_native.kernels.cpu_select import _float, _flipped, _keep_best, _kth_largest, _open, _select

TILE_BYTES = 576 << 10
"""Weights of one tile."""
ROWS = 64
"""Rows that pass by a tile together."""
BLOCK = 128
"""Rows of a block, for sums over latents."""


@jit
def _tile(d):
    """Latents a tile."""
    return max(16, TILE_BYTES // (4 * d))


@jit
def select_wide_rows(
    start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, by_size, x_BD, W_enc_FD, b_enc_F, k, r, guard, index_BK, value_BK,
    exact_B, again_B,
):  # fmt: skip
    """As `select_rows`, latents ascending; all k + r candidates are computed exactly. A row where they do not do is left to `_select`."""
    n, d = W_enc_FD.shape
    need = min(n, k + r)
    places, tile = min(n, 2 * need), _tile(d)
    maxima_G, score_C, value_C = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    found_C, order_C = np.empty(n, np.int64), np.empty(n, np.int32)
    found_RM, score_RM, value_RM = np.empty((ROWS, places), np.int64), np.empty((ROWS, places), np.float32), np.empty((ROWS, places), np.float32)
    count_R, next_R, bound_R = np.empty(ROWS, np.int64), np.empty(ROWS, np.int64), np.empty(ROWS, np.float32)
    for first in range(start, stop, ROWS):
        rows = min(ROWS, stop - first)
        for i in range(rows):
            b = first + i
            m, t = _open(
                kind, by_size, scores32_CF[b - at], scores16_CF[b - at], scale_F, row_scale_B[b], b_enc_F, need, maxima_G, found_C, score_C
            )
            bound_R[i], next_R[i] = t, 0
            count_R[i] = m if m <= places else 0
            for c in range(count_R[i]):
                found_RM[i, c], score_RM[i, c] = found_C[c], score_C[c]
        for f in range(0, n, tile):
            for i in range(rows):
                p = q = next_R[i]
                while q < count_R[i] and found_RM[i, q] < f + tile:
                    q += 1
                dots(x_BD[first + i], W_enc_FD, found_RM[i, p:q], q - p, value_RM[i, p:q], False)
                next_R[i] = q
        for i in range(rows):
            b, m = first + i, count_R[i]
            square = np.float32(0)
            for c in range(m):
                value = value_RM[i, c] + b_enc_F[found_RM[i, c]]
                value_RM[i, c] = value
                miss = (abs(value) if by_size else value) - score_RM[i, c]
                square += miss * miss
            last, taken, again = np.int32(0), 0, 0
            if m > 0:
                last = _kth_largest(value_RM[i], by_size, m, k, order_C)
                bar = max(_float(_flipped(last)), np.float32(0))
                again = 0 if m == n or bar - bound_R[i] >= guard * np.sqrt(square / np.float32(m)) or not (square < np.inf) else 1
            if m == 0 or again:
                taken, total, again = _select(
                    x_BD[b], W_enc_FD, b_enc_F, kind, by_size, scores32_CF[b - at], scores16_CF[b - at], scale_F, row_scale_B[b], k, r, guard,
                    maxima_G, found_C, score_C, value_C, order_C,
                )  # fmt: skip
                for j in range(taken):
                    index_BK[b, j], value_BK[b, j] = found_C[j], value_C[j]
                m, again = m + total, again + 1
            else:
                taken = _keep_best(order_C, last, min(k, m), found_RM[i], value_RM[i], m, index_BK[b], value_BK[b])
            for j in range(taken, k):
                index_BK[b, j], value_BK[b, j] = 0, 0
            exact_B[b], again_B[b] = m, again


@jit
def reconstruct_wide_rows(start, stop, target_BD, index_BK, value_BK, W_dec_FD, weight, residual_BD, grad_BD, delta_BK, error_B):
    """As `reconstruct_rows`."""
    n, d = W_dec_FD.shape
    width, tile = index_BK.shape[1], _tile(d)
    place_RK, index_RK = np.empty((ROWS, width), np.int64), np.empty((ROWS, width), np.int64)
    value_RK, delta_K = np.empty((ROWS, width), np.float32), np.empty(width, np.float32)
    count_R, next_R = np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    for first in range(start, stop, ROWS):
        rows = min(ROWS, stop - first)
        for i in range(rows):
            b, m, ordered = first + i, 0, True
            for j in range(width):
                if value_BK[b, j] != 0:
                    ordered = ordered and (m == 0 or index_RK[i, m - 1] <= index_BK[b, j])
                    place_RK[i, m], index_RK[i, m], value_RK[i, m] = j, index_BK[b, j], -value_BK[b, j]
                    m += 1
                delta_BK[b, j] = 0
            if not ordered:
                ascending(index_RK[i], place_RK[i], m)
                for j in range(m):
                    value_RK[i, j] = -value_BK[b, place_RK[i, j]]
            count_R[i], next_R[i] = m, 0
            for j in range(d):
                residual_BD[b, j] = target_BD[b, j]
        for f in range(0, n, tile):
            for i in range(rows):
                p = q = next_R[i]
                while q < count_R[i] and index_RK[i, q] < f + tile:
                    q += 1
                weighted_sum(value_RK[i, p:q], W_dec_FD, index_RK[i, p:q], q - p, residual_BD[first + i], False)
                next_R[i] = q
        for i in range(rows):
            e_D, g_D = residual_BD[first + i], grad_BD[first + i]
            error_B[first + i] = dot(e_D, e_D)
            for j in range(d):
                g_D[j] = np.float32(-2) * weight * e_D[j]
            next_R[i] = 0
        for f in range(0, n, tile):
            for i in range(rows):
                b = first + i
                p = q = next_R[i]
                while q < count_R[i] and index_RK[i, q] < f + tile:
                    q += 1
                dots(grad_BD[b], W_dec_FD, index_RK[i, p:q], q - p, delta_K, False)
                for j in range(p, q):
                    delta_BK[b, place_RK[i, j]] = delta_K[j - p]
                next_R[i] = q


@jit
def sum_latents_in_blocks(start, stop, offset_F, row_N, place_N, weight_N, source_BD, out_FD):
    """As `sum_latents` without projection: out_f = Σ w source over the pairs of f, a block of rows after the other. Returns the sum of squares."""
    next_F = offset_F[start:stop].copy()
    for f in range(start, stop):
        for i in range(out_FD.shape[1]):
            out_FD[f, i] = 0
    weight_B = np.empty(BLOCK, np.float32)
    for last in range(BLOCK, source_BD.shape[0] + BLOCK, BLOCK):
        for f in range(start, stop):
            p = q = next_F[f - start]
            while q < offset_F[f + 1] and row_N[q] < last:
                weight_B[q - p] = weight_N[place_N[q]]
                q += 1
                if q - p == BLOCK:
                    weighted_sum(weight_B, source_BD, row_N[p:q], q - p, out_FD[f], False)
                    p = q
            weighted_sum(weight_B, source_BD, row_N[p:q], q - p, out_FD[f], False)
            next_F[f - start] = q
    square = 0.0
    for f in range(start, stop):
        square += dot(out_FD[f], out_FD[f])
    return square
