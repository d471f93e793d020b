"""Rows and weights in int8 in; the latents whose scores reach a bound, and their exact selection, out, while no score leaves the registers but those.

A product that returns all scores writes and reads gigabytes a batch, of which a few in a thousand numbers are wanted. Here a tile of 64 latents is
multiplied with six rows at a time, and what reaches a row's bound is written down at once. The bound comes from the row's scores of every eighth tile:
there it lies so high (`Scanner.rank`) that two or three times the candidates wanted are to be expected, and fewer than wanted in very few rows. Such
a row, or one with more than there are places, is multiplied once more and selected from all its scores. So the bound sets the work, not the result.
"""

from __future__ import annotations

import numpy as np

from saehub_native.kernels import instructions
from saehub_native.kernels.cpu_arithmetic import jit, pack, prefetch_row
from saehub_native.kernels.cpu_select import INT8, _bits, _decide, _flipped, _float, _select, _threshold, _winners, _write

LATENTS, WIDTH, ROWS, EVERY = instructions.LATENTS, instructions.WIDTH, instructions.ROWS, 8
SPARE = LATENTS
multiply, sift = instructions.multiplier(), instructions.sifter()
THERE = multiply is not None and sift is not None
"""Whether this processor has what it takes."""


@jit
def pack_tiles(start, stop, low_FS, tile_TSL):
    """Tiles start … stop − 1 in the layout that `multiply` takes: low_FS int32 [F, steps], four weights in each; tile_TSL int32 [tiles, steps, 64]."""
    n, steps = low_FS.shape
    signs = np.int32(-2139062144)  # −128 in each byte
    for t in range(start, stop):
        lanes = min(LATENTS, n - t * LATENTS)
        for q in range(steps):
            for l in range(lanes):
                tile_TSL[t, q, l] = low_FS[t * LATENTS + l, q] ^ signs


@jit
def _beginnings(start, stop, low8_BD, begin_B):
    """What the sums of `multiply` begin with: −128 Σ x."""
    for b in range(start, stop):
        total = np.int32(0)
        for i in range(low8_BD.shape[1]):
            total += np.int32(low8_BD[b, i])
        begin_B[b] = np.int32(-128) * total


@jit
def _sift_few(sums_N, i, factor, scale_F, b_enc_F, f, count, mask, bound, latent_M, bits_M, m):
    """`sift` for fewer than 16 latents."""
    for l in range(count):
        bits = _bits(np.float32(sums_N[i + l]) * (scale_F[f + l] * factor) + b_enc_F[f + l]) & mask
        latent_M[m], bits_M[m] = f + l, bits
        m += np.int64(not _float(bits) < bound)
    return m


@jit
def _tighten(rank, latent_M, bits_M, m, key_M, place_M, kept_M):
    """Of m candidates the best, `rank` or some more, to the front. Returns how many, and a bound that they all reach and no other does."""
    for c in range(m):
        key_M[c] = _flipped(bits_M[c])
    bound = _threshold(key_M, m, min(rank, m), max(1, rank >> 3))
    left = pack(key_M, m, bound, place_M, kept_M, m)
    for c in range(left):  # places ascend: what is overwritten has been read
        latent_M[c], bits_M[c] = latent_M[place_M[c]], _flipped(kept_M[c])
    return left, _float(_flipped(bound))


@jit
def scan(start, stop, low8_BD, row_scale_B, tile_TSL, scale_F, rank, bound_R, latent_RM, bits_RM, count_R, by_size, b_enc_F):
    """The latents of rows start … stop − 1 whose score is at least the row's bound, and their scores' bits: count_R of them, or places + 1 where there
    are more. `rank`: which score of the sample is the bound, where there must be places for the whole sample; 0: bound_R is given, and latents ascend. Lists
    begin at row `start`."""
    n, (tiles, steps), rows, places = scale_F.shape[0], tile_TSL.shape[:2], stop - start, latent_RM.shape[1] - SPARE
    mask = np.int32(0x7FFFFFFF) if by_size else np.int32(-1)
    weights_N, sums_N, begin_B = tile_TSL.reshape(-1), np.empty(ROWS * LATENTS, np.int32), np.empty(low8_BD.shape[0], np.int32)
    _beginnings(start, min(stop + ROWS, low8_BD.shape[0]), low8_BD, begin_B)
    key_M, place_M, kept_M = np.empty(places + SPARE, np.int32), np.empty(places + SPARE, np.int32), np.empty(places + SPARE, np.int32)
    count_R[:rows] = 0
    if rank > 0:
        bound_R[:rows] = -np.inf
    for part in range(2 if rank > 0 else 1):
        for t in range(tiles):
            if rank > 0 and (t % EVERY == 0) != (part == 0):
                continue
            first = t * LATENTS
            whole = min(LATENTS, n - first) // WIDTH * WIDTH
            rest = min(LATENTS, n - first) - whole
            for b in range(start, stop, ROWS):
                multiply(weights_N, t, steps, low8_BD, b, begin_B, sums_N)
                # Here: to call another function for each row takes longer than what it does.
                for r in range(min(ROWS, stop - b)):
                    i, at, factor = b + r - start, r * LATENTS, row_scale_B[b + r]
                    m, bound, latent_M, bits_M = count_R[i], bound_R[i], latent_RM[i], bits_RM[i]
                    if m <= places:
                        for l in range(0, whole, WIDTH):
                            m = sift(sums_N, at + l, factor, scale_F, b_enc_F, first + l, mask, bound, latent_M, bits_M, m)
                        if rest:
                            m = _sift_few(
                                sums_N, at + whole, factor, scale_F, b_enc_F, first + whole, rest, mask, bound, latent_M, bits_M, m
                            )
                        count_R[i] = min(m, places + 1)
        if part == 0 and rank > 0:
            for i in range(rows):
                count_R[i], bound_R[i] = _tighten(rank, latent_RM[i], bits_RM[i], count_R[i], key_M, place_M, kept_M)


@jit
def select_scanned_rows(
    start, stop, low8_BD, row_scale_B, tile_TSL, scale_F, rank, bound_R, latent_RM, bits_RM, count_R, by_size, x_BD, W_enc_FD, b_enc_F, k, r, guard,
    index_BK, value_BK, exact_B, again_B,
):  # fmt: skip
    """As `select_rows`, from a scan, whose arguments come first."""
    n, rows, need, places = scale_F.shape[0], stop - start, k + r, latent_RM.shape[1] - SPARE
    scan(start, stop, low8_BD, row_scale_B, tile_TSL, scale_F, rank, bound_R, latent_RM, bits_RM, count_R, by_size, b_enc_F)
    maxima_G, score_C, value_C = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    found_C, order_C, left_R, left = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(rows, np.int64), 0
    key_M, place_M, kept_M = np.empty(places + SPARE, np.int32), np.empty(places + SPARE, np.int32), np.empty(places + SPARE, np.int32)
    for i in range(rows):
        b, m = start + i, count_R[i]
        prefetch_row(x_BD, min(b + 1, stop - 1))
        if k <= m <= places:
            bound = bound_R[i]
            if m > 2 * need:
                m, bound = _tighten(need + (need >> 1), latent_RM[i], bits_RM[i], m, key_M, place_M, kept_M)
            for c in range(m):
                found_C[c], score_C[c] = latent_RM[i, c], _float(bits_RM[i, c])
            done, enough = _decide(x_BD[b], W_enc_FD, b_enc_F, by_size, k, guard, bound, m, found_C, score_C, value_C, order_C)
            if enough:
                taken = _winners(by_size, k, done, found_C, value_C, order_C, score_C)
                _write(b, taken, k, found_C, value_C, index_BK, value_BK)
                exact_B[b], again_B[b] = done, 0
                continue
        left_R[left] = b
        left += 1
    # What is left: all scores, of six rows at a time.
    tiles, steps = tile_TSL.shape[:2]
    weights_N, sums_N, begin_B = tile_TSL.reshape(-1), np.empty(ROWS * LATENTS, np.int32), np.empty(ROWS, np.int32)
    low_RD, score_RF, none_R0 = (
        np.zeros((ROWS, low8_BD.shape[1]), np.int8),
        np.empty((ROWS if left else 0, n), np.int32),
        np.empty((ROWS, 0), np.int16),
    )
    for first in range(0, left, ROWS):
        some = min(ROWS, left - first)
        for i in range(some):
            low_RD[i] = low8_BD[left_R[first + i]]
        _beginnings(0, ROWS, low_RD, begin_B)
        for t in range(tiles):
            multiply(weights_N, t, steps, low_RD, 0, begin_B, sums_N)
            for i in range(some):
                for l in range(min(LATENTS, n - t * LATENTS)):
                    score_RF[i, t * LATENTS + l] = sums_N[i * LATENTS + l]
        for i in range(some):
            b = left_R[first + i]
            taken, total, again = _select(
                x_BD[b], W_enc_FD, b_enc_F, INT8, by_size, score_RF, none_R0, i, scale_F, row_scale_B[b], k, r, guard, maxima_G, found_C, score_C,
                value_C, order_C,
            )  # fmt: skip
            _write(b, taken, k, found_C, value_C, index_BK, value_BK)
            exact_B[b], again_B[b] = total, again


@jit
def collect_scanned_rows(
    start, stop, low8_BD, row_scale_B, tile_TSL, scale_F, bound_R, latent_RM, bits_RM, count_R, b_enc_F, index_BM, score_BM, count_B
):  # fmt: skip
    """As `collect_rows`, from a scan; bound_R holds what is to be reached."""
    scan(start, stop, low8_BD, row_scale_B, tile_TSL, scale_F, 0, bound_R, latent_RM, bits_RM, count_R, False, b_enc_F)
    places = index_BM.shape[1]
    for i in range(stop - start):
        count_B[start + i] = min(count_R[i], places + 1)
        for c in range(min(count_R[i], places)):
            index_BM[start + i, c], score_BM[start + i, c] = latent_RM[i, c], _float(bits_RM[i, c])
