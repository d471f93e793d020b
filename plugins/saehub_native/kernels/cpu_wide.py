"""Rows and weights in, where a row selects a good part of all latents; selections, and reconstructions with all their gradients, out: compiled loops.

AuxK among the dead latents is such a case. Rows of weights would come from memory again and again, so a block of rows stays in the second cache
while the latents pass by it, or a tile of latents while the rows do, and the pairs lie in the order in which they are used. Every function's
result for one row or latent depends on nothing outside it.
"""

from __future__ import annotations

import numpy as np

from saehub_native.kernels.cpu_arithmetic import SPARE, ascending, dot, dots, dots_and_sum, jit, pack, prefetch_row, weighted_sum
from saehub_native.kernels.cpu_select import BFLOAT16, _float, _flipped, _keep_best, _kth_largest, _load_keys, _select, _threshold

TILE_BYTES = 576 << 10
"""Weights of one tile."""
BLOCK = 256
"""Rows of a block."""


def tile_of(d: int) -> int:
    """Latents a tile."""
    return max(16, TILE_BYTES // (4 * d))


# Selection


@jit
def _starts(count_F, n):
    """In place of counts, where each begins; the last place gets the sum."""
    total = np.int32(0)
    for f in range(n):
        count = count_F[f]
        count_F[f] = total
        total += count
    count_F[n] = total


@jit
def pick_rows(start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, pick_N, out32_CN, out16_CN):
    """The scores of some latents of rows start … stop − 1."""
    for b in range(start - at, stop - at):
        if kind == BFLOAT16:
            for j in range(pick_N.shape[0]):
                out16_CN[b, j] = scores16_CF[b, pick_N[j]]
        else:
            for j in range(pick_N.shape[0]):
                out32_CN[b, j] = scores32_CF[b, pick_N[j]]


@jit
def select_wide_rows(
    start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, by_size, x_BD, W_enc_FD, b_enc_F, k, r, guard, index_BK, value_BK,
    exact_B, again_B,
):  # fmt: skip
    """As `select_rows`, latents ascending; all k + r candidates are computed exactly. A row where they do not do is left to `_select`."""
    n = W_enc_FD.shape[0]
    need = min(n, k + r)
    places = min(n, 2 * need)
    maxima_G, score_C, value_C = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    found_C, order_C, key_F = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32)
    float_F = key_F.view(np.float32)
    key_RM, latent_RM = np.empty((BLOCK, places + SPARE), np.int32), np.empty((BLOCK, places + SPARE), np.int32)
    value_RM = np.empty((BLOCK, places), np.float32)
    next_F, row_N, place_N, value_N = np.empty(n + 1, np.int32), np.empty(BLOCK * places, np.int32), np.empty(BLOCK * places, np.int32), np.empty(BLOCK, np.float32)
    count_R, bound_R = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.float32)
    flat_N = value_RM.reshape(-1)
    for first in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - first)
        next_F[:] = 0
        for i in range(rows):
            b = first + i
            _load_keys(kind, by_size, scores32_CF[b - at], scores16_CF[b - at], scale_F, row_scale_B[b], b_enc_F, key_F, float_F)
            t = _threshold(key_F, n, need, max(need >> 5, min(need >> 3, 8)))
            m = pack(key_F, n, t, latent_RM[i], key_RM[i], places)
            bound_R[i] = _float(_flipped(t))
            count_R[i] = m if m <= places else 0
            for c in range(count_R[i]):
                next_F[latent_RM[i, c]] += 1
        _starts(next_F, n)
        for i in range(rows):
            for c in range(count_R[i]):
                q = next_F[latent_RM[i, c]]
                row_N[q], place_N[q] = first + i, i * places + c
                next_F[latent_RM[i, c]] = q + 1
        q = 0
        for f in range(n):
            p, q = q, np.int64(next_F[f])
            prefetch_row(W_enc_FD, min(f + 1, n - 1))
            dots(W_enc_FD[f], x_BD, row_N[p:q], q - p, value_N, False)
            for c in range(q - p):
                flat_N[place_N[p + c]] = value_N[c] + b_enc_F[f]
        for i in range(rows):
            b, m = first + i, count_R[i]
            square = np.float32(0)
            for c in range(m):
                miss = (abs(value_RM[i, c]) if by_size else value_RM[i, c]) - _float(_flipped(key_RM[i, c]))
                square += miss * miss
            last, taken, again = np.int32(0), 0, 0
            if m > 0:
                last = _kth_largest(value_RM[i], by_size, m, k, order_C)
                bar = max(_float(_flipped(last)), np.float32(0))
                again = 0 if m == n or bar - bound_R[i] >= guard * np.sqrt(square / np.float32(m)) or not (square < np.inf) else 1
            if m == 0 or again:
                taken, total, again = _select(
                    x_BD[b], W_enc_FD, b_enc_F, kind, by_size, scores32_CF, scores16_CF, b - at, scale_F, row_scale_B[b], k, r, guard,
                    maxima_G, found_C, score_C, value_C, order_C,
                )  # fmt: skip
                for j in range(taken):
                    index_BK[b, j], value_BK[b, j] = found_C[j], value_C[j]
                m, again = m + total, again + 1
            else:
                taken = _keep_best(order_C, last, min(k, m), latent_RM[i], value_RM[i], m, index_BK[b], value_BK[b])
            for j in range(taken, k):
                index_BK[b, j], value_BK[b, j] = 0, 0
            exact_B[b], again_B[b] = m, again


# Reconstruction and its gradients


@jit
def arrange_block(block, index_BK, value_BK, tile, start_PF, row_N, weight_N, start_PT, latent_N, value_N):
    """The pairs of a block of rows in two orders, those of value 0 left out.

    By latent, rows ascending: pairs start_PF[block, f] … start_PF[block, f + 1] − 1 of the block's are f's, with their row and value.
    By tile of latents, then row: those from start_PT[block, t · BLOCK + i] belong to tile t and row i, latents ascending. A block's pairs begin
    at block · BLOCK · K in both.
    """
    n_rows, width = index_BK.shape
    first = block * BLOCK
    rows, base = min(BLOCK, n_rows - first), first * width
    n, places = start_PF.shape[1] - 1, start_PT.shape[1] - 1
    next_F, next_T = np.zeros(n + 1, np.int32), np.zeros(places + 1, np.int32)
    for i in range(rows):
        b, before = first + i, np.int64(-1)
        ordered = True
        for j in range(width):
            if value_BK[b, j] != 0:
                ordered = ordered and index_BK[b, j] > before
                before = index_BK[b, j]
        if not ordered:
            ascending(index_BK[b], value_BK[b], width)
        place, bound = i, np.int64(tile)
        for j in range(width):
            if value_BK[b, j] != 0:
                f = index_BK[b, j]
                while f >= bound:
                    place, bound = place + BLOCK, bound + tile
                next_F[f] += 1
                next_T[place] += 1
    _starts(next_F, n)
    _starts(next_T, places)
    start_PF[block], start_PT[block] = next_F, next_T
    for i in range(rows):
        b, place, bound = first + i, i, np.int64(tile)
        for j in range(width):
            v = value_BK[b, j]
            if v != 0:
                f = index_BK[b, j]
                while f >= bound:
                    place, bound = place + BLOCK, bound + tile
                p, q = base + next_F[f], base + next_T[place]
                row_N[p], weight_N[p], latent_N[q], value_N[q] = b, v, f, -v
                next_F[f] += 1
                next_T[place] += 1


@jit
def residual_of_blocks(start, stop, W_dec_FD, tile, start_PT, latent_N, value_N, width, weight, residual_BD, grad_BD, error_B):
    """residual −= Σ v W_dec over the pairs, grad = −2 weight residual and error = |residual|², for the rows of blocks start … stop − 1."""
    n_rows, d = residual_BD.shape
    for t in range((start_PT.shape[1] - 1) // BLOCK):
        for block in range(start, stop):
            first = block * BLOCK
            base = first * width
            for i in range(min(BLOCK, n_rows - first)):
                p, q = base + start_PT[block, t * BLOCK + i], base + start_PT[block, t * BLOCK + i + 1]
                prefetch_row(residual_BD, min(first + i + 1, n_rows - 1))
                weighted_sum(value_N[p:q], W_dec_FD, latent_N[p:q], q - p, residual_BD[first + i], False)
    for b in range(start * BLOCK, min(n_rows, stop * BLOCK)):
        e_D, g_D = residual_BD[b], grad_BD[b]
        error_B[b] = dot(e_D, e_D)
        for i in range(d):
            g_D[i] = np.float32(-2) * weight * e_D[i]


@jit
def gradients_of_latents(start, stop, W_dec_FD, start_PF, row_N, weight_N, delta_N, width, x_BD, grad_BD, enc_FD, dec_FD, bias_F):
    """Of latents start … stop − 1, over all their pairs (v, row b): δ = ⟨grad_b, W_dec⟩; enc = Σ δ x_b, dec = Σ v grad_b, bias = Σ δ."""
    enc_FD[start:stop] = 0
    dec_FD[start:stop] = 0
    bias_F[start:stop] = 0
    for block in range(start_PF.shape[0]):
        base = block * BLOCK * width
        for f in range(start, stop):
            p, q = base + start_PF[block, f], base + start_PF[block, f + 1]
            following = min(f + 1, stop - 1)
            prefetch_row(W_dec_FD, following)
            prefetch_row(dec_FD, following)
            dots_and_sum(W_dec_FD[f], grad_BD, row_N[p:q], q - p, weight_N[p:q], delta_N[p:q], dec_FD[f])
    for block in range(start_PF.shape[0]):
        base = block * BLOCK * width
        for f in range(start, stop):
            p, q = base + start_PF[block, f], base + start_PF[block, f + 1]
            prefetch_row(enc_FD, min(f + 1, stop - 1))
            weighted_sum(delta_N[p:q], x_BD, row_N[p:q], q - p, enc_FD[f], False)
            total = np.float32(0)  # not in place: how a sum in memory is computed may depend on what lies beside it
            for i in range(p, q):
                total += delta_N[i]
            bias_F[f] += total
