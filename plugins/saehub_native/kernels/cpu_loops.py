"""Rows and weights as numpy arrays in; residuals, gradients of values and updated weights out: the compiled loops of the CPU kernels.

Every function works on a range of rows or latents, so that any number of threads can share the work, and its result for one row or latent
depends on nothing outside it. How latents are selected: cpu_select.py.
"""

from __future__ import annotations

import numpy as np

from saehub_native.kernels.cpu_arithmetic import add, dot, dots, jit, prefetch_row, weighted_sum

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
TOGETHER = 32
"""Latents whose gradients fit in the second cache with room to spare."""


# Rows for the ranking product


@jit
def low_rows(start, stop, x_BD, kind, smooth_D, low16_BD, low8_BD, low_scale_B):
    """The low-precision copy of rows: bfloat16, or int8 of x/smooth with one scale a row."""
    d = x_BD.shape[1]
    scaled_D = np.empty(d, np.float32)
    bits_D = scaled_D.view(np.int32)
    for b in range(start, stop):
        if kind == BFLOAT16:
            for i in range(d):
                scaled_D[i] = x_BD[b, i]
            _to_bfloat16(bits_D, low16_BD[b])
        elif kind == INT8:
            for i in range(d):
                scaled_D[i] = x_BD[b, i] / smooth_D[i]
            low_scale_B[b] = _to_int8(scaled_D, bits_D, low8_BD[b])


@jit
def shadow_rows(start, stop, W_FD, kind, smooth_D, low16_FD, low8_FD, low_scale_F):
    """The low-precision copy of weights that scores are computed with; int8: of W·smooth, one scale a latent."""
    d = W_FD.shape[1]
    scaled_D = np.empty(d, np.float32)
    bits_D = scaled_D.view(np.int32)
    for f in range(start, stop):
        _shadow(W_FD[f], kind, smooth_D, low16_FD, low8_FD, low_scale_F, f, scaled_D, bits_D)


@jit
def _shadow(w_D, kind, smooth_D, low16_FD, low8_FD, low_scale_F, f, scaled_D, bits_D):
    d = w_D.shape[0]
    if kind == BFLOAT16:
        for i in range(d):
            scaled_D[i] = w_D[i]
        _to_bfloat16(bits_D, low16_FD[f])
    elif kind == INT8:
        for i in range(d):
            scaled_D[i] = w_D[i] * smooth_D[i]
        low_scale_F[f] = _to_int8(scaled_D, bits_D, low8_FD[f])


@jit
def _to_bfloat16(bits_D, out_D):
    """To the nearest bfloat16, ties to even, as int16 bits."""
    for i in range(bits_D.shape[0]):
        b = bits_D[i]
        out_D[i] = np.int16((b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@jit
def _to_int8(x_D, bits_D, out_D):
    """round(127 x / max|x|) into `out_D`; returns max|x| / 127. `bits_D` is `x_D` as int32: whole numbers, whose maximum is found many at a time.

    Where x is not finite, zeros and the maximum, so that no score of these can be taken for a number.
    """
    bits = np.int32(0)
    for i in range(bits_D.shape[0]):
        bits = max(bits, bits_D[i] & np.int32(0x7FFFFFFF))
    top = max(np.int32(bits).view(np.float32), np.float32(1e-30))
    if not top < np.inf:
        out_D[:] = 0
        return top
    factor = np.float32(127) / top
    for i in range(x_D.shape[0]):
        out_D[i] = np.int8(np.rint(x_D[i] * factor))
    return top / np.float32(127)


# Rows: decode, residual, gradients of the values


@jit
def reconstruct_rows(start, stop, target_BD, index_BK, value_BK, W_dec_FD, weight, residual_BD, grad_BD, delta_BK, error_B):
    """residual = target − Σ_j v_j W_dec[i_j], grad = −2 weight residual, δ_j = ⟨grad, W_dec[i_j]⟩·[v_j ≠ 0], error = |residual|², while the
    rows of W_dec are in cache. `residual_BD` may be `target_BD`."""
    d, width = target_BD.shape[1], index_BK.shape[1]
    active_K, index_K = np.empty(width, np.int64), np.empty(width, np.int64)
    value_K, delta_K = np.empty(width, np.float32), np.empty(width, np.float32)
    for b in range(start, stop):
        n = 0
        for j in range(width):
            if value_BK[b, j] != 0:
                active_K[n], index_K[n], value_K[n] = j, index_BK[b, j], -value_BK[b, j]
                n += 1
            delta_BK[b, j] = 0
        e_D, g_D = residual_BD[b], grad_BD[b]
        for i in range(d):
            e_D[i] = target_BD[b, i]
        weighted_sum(value_K, W_dec_FD, index_K, n, e_D, True)
        error_B[b] = dot(e_D, e_D)
        for i in range(d):
            g_D[i] = np.float32(-2) * weight * e_D[i]
        dots(g_D, W_dec_FD, index_K, n, delta_K, False)
        for j in range(n):
            delta_BK[b, active_K[j]] = delta_K[j]


@jit
def copy_rows(start, stop, e_BD, copy_BD, sum_D):
    """`copy_BD` = `e_BD`, and `sum_D` the sum of the rows start … stop − 1; returns the sum of their squares."""
    square = 0.0
    sum_D[:] = 0
    for b in range(start, stop):
        copy_BD[b] = e_BD[b]
        add(np.float32(1), e_BD[b], sum_D)
        square += dot(e_BD[b], e_BD[b])
    return square


@jit
def row_norms(start, stop, x_BD, norm_B):
    """|x| of rows start … stop − 1."""
    for b in range(start, stop):
        norm_B[b] = np.sqrt(dot(x_BD[b], x_BD[b]))


# Latents: pairs grouped by latent, gradients, clipping, Adam, norm


# Counting sort of the pairs of value ≠ 0 by latent, rows ascending; pairs of f: offset_F[f] … offset_F[f + 1] − 1.


@jit
def count_piece(start, stop, index_N, value_N, count_F):
    """count_F[f] = how many of the pairs start … stop − 1 are f's, of value ≠ 0."""
    for f in range(count_F.shape[0]):
        count_F[f] = 0
    for p in range(start, stop):
        if value_N[p] != 0:
            count_F[index_N[p]] += 1


@jit
def start_pieces(count_PF, offset_F):
    """Offsets of all latents, and in place of the counts where each piece begins to write."""
    total = 0
    for f in range(count_PF.shape[1]):
        offset_F[f] = total
        for p in range(count_PF.shape[0]):
            count = count_PF[p, f]
            count_PF[p, f] = total
            total += count
    offset_F[count_PF.shape[1]] = total


@jit
def place_piece(start, stop, index_N, value_N, width, next_F, row_N, place_N):
    """Write the pairs start … stop − 1 to their places."""
    for p in range(start, stop):
        if value_N[p] != 0:
            q = next_F[index_N[p]]
            row_N[q], place_N[q] = p // width, p
            next_F[index_N[p]] = q + 1


@jit
def sum_numbers(start, stop, offset_F, row_N, place_N, weight_N, source_B1, out_F1):
    """As `sum_latents` for a source of width 1."""
    for f in range(start, stop):
        total = np.float32(0)
        for q in range(offset_F[f], offset_F[f + 1]):
            total += weight_N[place_N[q]] * source_B1[row_N[q], 0]
        out_F1[f, 0] = total


@jit
def _sum_pairs(f, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, total_D):
    """total = Σ w source over the pairs of f, plus its row of `extra` if it has one. Whether there was anything."""
    for i in range(total_D.shape[0]):
        total_D[i] = 0
    weight_4 = np.empty(4, np.float32)
    for first in range(offset_F[f], offset_F[f + 1], 4):
        n = min(4, offset_F[f + 1] - first)
        for q in range(n):
            weight_4[q] = weight_N[place_N[first + q]]
        weighted_sum(weight_4, source_BD, row_N[first : first + n], n, total_D, False)
    s = slot_F[f]
    if s >= 0:
        add(np.float32(1), extra_ED[s], total_D)
    return s >= 0 or offset_F[f + 1] > offset_F[f]


@jit
def _project(g_D, w_D):
    add(-dot(g_D, w_D), w_D, g_D)


@jit
def sum_latents(start, stop, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, sphere, W_FD, out_FD):
    """The gradient of latents start … stop − 1: written to out_FD if it has rows. Returns the sum of squares."""
    g_D = np.empty(source_BD.shape[1], np.float32)
    square = 0.0
    for f in range(start, stop):
        some = _sum_pairs(f, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, g_D)
        if sphere and some:
            _project(g_D, W_FD[f])
        square += dot(g_D, g_D)
        if out_FD.shape[0] > 0:
            out_FD[f] = g_D
    return square


@jit
def bound_latents(start, stop, offset_F, row_N, place_N, weight_N, norm_B, slot_F, extra_norm_E):
    """Σ_f (Σ |w| |source|)², over latents start … stop − 1: an upper bound of the sum of squares that `sum_latents` returns."""
    square = 0.0
    for f in range(start, stop):
        total = 0.0
        for q in range(offset_F[f], offset_F[f + 1]):
            weight = weight_N[place_N[q]]
            total += (weight if weight > 0 else -weight) * norm_B[row_N[q]]
        if slot_F[f] >= 0:
            total += extra_norm_E[slot_F[f]]
        square += total * total
    return square


@jit
def _adam(p_D, m_D, v_D, g_D, factor, new1, beta2, new2, size, spread, eps):
    # new1 = 1 − β₁ and new2 = 1 − β₂ come from float64: in float32, 1 − 0.999 is off by 1.3e-5, and every step with it
    for i in range(p_D.shape[0]):
        g = g_D[i] * factor
        m = m_D[i] + new1 * (g - m_D[i])
        v = v_D[i] * beta2 + new2 * g * g
        m_D[i] = m
        v_D[i] = v
        p_D[i] -= size * m / (np.sqrt(v) / spread + eps)


@jit
def update_latents(
    start, stop, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, sphere, tiny, W_FD, m_FD, v_FD, factor, new1, beta2,
    new2, size, spread, eps, kind, smooth_D, low16_FD, low8_FD, low_scale_F,
):  # fmt: skip
    """Gradient, projection, Adam, unit norm and low-precision copy of latents start … stop − 1, some of them at a time: gathering the rows of
    the pairs and streaming through the weights and moments do not disturb each other, and the gradients stay in cache between."""
    d = W_FD.shape[1]
    g_GD, some_G, scaled_D = np.empty((TOGETHER, d), np.float32), np.empty(TOGETHER, np.bool_), np.empty(d, np.float32)
    bits_D = scaled_D.view(np.int32)
    for first in range(start, stop, TOGETHER):
        last = min(stop, first + TOGETHER)
        for f in range(first, last):
            some_G[f - first] = _sum_pairs(f, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, g_GD[f - first])
        for f in range(first, last):
            w_D, g_D = W_FD[f], g_GD[f - first]
            if sphere and some_G[f - first]:
                _project(g_D, w_D)
            _adam(w_D, m_FD[f], v_FD[f], g_D, factor, new1, beta2, new2, size, spread, eps)
            if sphere:
                inverse = np.float32(1) / max(np.sqrt(dot(w_D, w_D)), tiny)
                for i in range(d):
                    w_D[i] *= inverse
            _shadow(w_D, kind, smooth_D, low16_FD, low8_FD, low_scale_F, f, scaled_D, bits_D)
