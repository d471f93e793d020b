"""Rows, scores and weights as numpy arrays in; selections, residuals and updated weights out: the compiled loops of the CPU kernels.

Every function works on a range of rows or latents, so that any number of threads can share the work, and its result for one row or latent
depends on nothing outside it. `need`, `r` and `guard` are explained in cpu.py. Scores are approximate pre-activations, ordered as integers:
for the bits b of a float32, `b ^ ((b >> 31) & 0x7fffffff)` is an int32 of the same order, and the same operation leads back.
"""

from __future__ import annotations

import numpy as np

from saehub_native.kernels import compiled

jit = compiled.compiler(__file__, compiled.__file__)

FLOAT32, BFLOAT16, INT8 = 0, 1, 2


@jit
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@jit
def _add(factor, source, total):
    for i in range(total.shape[0]):
        total[i] += factor * source[i]


# Four at a time: rows of weights come from far memory, and four streams of loads overlap where one would wait.


@jit
def _dots(a_D, W_FD, index_C, count, out_C):
    """out_C[c] = ⟨a, W[index_C[c]]⟩ for c < count."""
    d, c = a_D.shape[0], 0
    while c + 4 <= count:
        p, q, r, s = W_FD[index_C[c]], W_FD[index_C[c + 1]], W_FD[index_C[c + 2]], W_FD[index_C[c + 3]]
        t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(d):
            a = a_D[i]
            t0 += a * p[i]
            t1 += a * q[i]
            t2 += a * r[i]
            t3 += a * s[i]
        out_C[c], out_C[c + 1], out_C[c + 2], out_C[c + 3] = t0, t1, t2, t3
        c += 4
    while c < count:
        out_C[c] = _dot(a_D, W_FD[index_C[c]])
        c += 1


@jit
def _weighted_sum(weight_C, W_FD, index_C, count, total_D):
    """total += Σ_{c < count} weight_C[c] W[index_C[c]]."""
    d, c = total_D.shape[0], 0
    while c + 4 <= count:
        p, q, r, s = W_FD[index_C[c]], W_FD[index_C[c + 1]], W_FD[index_C[c + 2]], W_FD[index_C[c + 3]]
        w0, w1, w2, w3 = weight_C[c], weight_C[c + 1], weight_C[c + 2], weight_C[c + 3]
        for i in range(d):
            total_D[i] += (w0 * p[i] + w1 * q[i]) + (w2 * r[i] + w3 * s[i])
        c += 4
    while c < count:
        _add(weight_C[c], W_FD[index_C[c]], total_D)
        c += 1


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
            low_scale_B[b] = _to_int8(scaled_D, low8_BD[b])


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
        low_scale_F[f] = _to_int8(scaled_D, low8_FD[f])


@jit
def _to_bfloat16(bits_D, out_D):
    """To the nearest bfloat16, ties to even, as int16 bits."""
    for i in range(bits_D.shape[0]):
        b = bits_D[i]
        out_D[i] = np.int16((b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@jit
def _to_int8(x_D, out_D):
    """round(127 x / max|x|) into `out_D`; returns max|x| / 127."""
    top = np.float32(1e-30)
    for i in range(x_D.shape[0]):
        a = abs(x_D[i])
        top = a if a > top else top
    factor = np.float32(127) / top
    for i in range(x_D.shape[0]):
        out_D[i] = np.int8(np.rint(x_D[i] * factor))
    return top / np.float32(127)


# Selection


@jit
def _load_keys(kind, by_size, scores32_F, scores16_F, scale_F, row_scale, b_enc_F, keys_F, floats_F):
    """Approximate pre-activations of one row (their absolute values if `by_size`) as ordered integers; `floats_F` is `keys_F` as float32."""
    n = keys_F.shape[0]
    if kind == INT8:
        for f in range(n):
            floats_F[f] = np.float32(scores32_F[f]) * (scale_F[f] * row_scale) + b_enc_F[f]
    else:
        if kind == BFLOAT16:
            for f in range(n):
                keys_F[f] = np.int32(scores16_F[f]) << np.int32(16)
        else:
            for f in range(n):
                keys_F[f] = scores32_F[f]
        for f in range(n):
            floats_F[f] += b_enc_F[f]
    if by_size:
        for f in range(n):
            keys_F[f] &= np.int32(0x7FFFFFFF)
    for f in range(n):
        keys_F[f] ^= (keys_F[f] >> np.int32(31)) & np.int32(0x7FFFFFFF)


@jit
def _threshold(keys_N, n, need, slack):
    """A t with need ≤ |{keys ≥ t}| ≤ need + slack, or the largest t with at least `need` where ties allow no such t."""
    top = np.int32(-2147483648)
    for i in range(n):
        top = keys_N[i] if keys_N[i] > top else top
    low, high = np.int64(-2147483648), np.int64(top) + 1
    near = np.int64(top) - (np.int64(4) << 23)  # a sixteenth of the largest, for positive floats: usually below the answer
    guess = near if near > low else (low + high) >> 1
    while high - low > 1:
        t, count = np.int32(guess), np.int32(0)
        for i in range(n):
            count += np.int32(keys_N[i] >= t)
        if count >= need:
            low = guess
            if count <= need + slack:
                break
        else:
            high = guess
        guess = (low + high) >> 1
    return np.int32(low)


@jit
def _open(keys_F, need, group, maxima_G, found_C):
    """The positions of all entries ≥ t for a t that at least `need` entries reach. Returns their number and t.

    t is (nearly) the need-th largest of the maxima of strided groups, so at least `need` entries reach it; only groups that reach it are opened.
    """
    n = keys_F.shape[0]
    n_groups = n // group
    for i in range(n_groups):
        maxima_G[i] = keys_F[i]
    for j in range(1, group):
        for i in range(n_groups):
            v = keys_F[j * n_groups + i]
            maxima_G[i] = v if v > maxima_G[i] else maxima_G[i]
    rest = n - n_groups * group
    for i in range(rest):
        maxima_G[n_groups + i] = keys_F[n_groups * group + i]
    t = _threshold(maxima_G, n_groups + rest, need, need >> 3)
    m = 0
    for i in range(n_groups):
        if maxima_G[i] >= t:
            for j in range(group):
                if keys_F[j * n_groups + i] >= t:
                    found_C[m] = j * n_groups + i
                    m += 1
    for i in range(n_groups * group, n):
        if keys_F[i] >= t:
            found_C[m] = i
            m += 1
    return m, t


@jit
def group_size(n, need):
    """Members of a group, such that there are clearly more groups than wanted entries."""
    group = 16
    while group > 1 and n // group < 4 * need:
        group >>= 1
    return group


@jit
def _flipped(key):
    return key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))


@jit
def _select(x_D, W_enc_FD, b_enc_F, keys_F, by_size, k, r, guard, maxima_G, found_C, value_C, order_C, floats_1, bits_1):
    """The float32 top k of a row (by |p| if `by_size`): candidates by score, decided by exact values.

    The winners come first in found_C and value_C; those that a ReLU sets to zero are left out. Returns how many there are, how many
    values were computed exactly, and how often the candidates had to be doubled.
    """
    n = keys_F.shape[0]
    ordered_C = order_C.view(np.float32)
    need, again, last = min(n, k + r), 0, np.int32(0)
    while True:
        m, t = _open(keys_F, need, group_size(n, need), maxima_G, found_C)
        _dots(x_D, W_enc_FD, found_C, m, value_C)
        square = np.float32(0)
        for c in range(m):
            f = found_C[c]
            value = value_C[c] + b_enc_F[f]
            value_C[c] = value
            value = abs(value) if by_size else value
            ordered_C[c] = value
            bits_1[0] = _flipped(keys_F[f])
            miss = value - floats_1[0]
            square += miss * miss
        for c in range(m):
            order_C[c] = _flipped(order_C[c])
        last = _threshold(order_C, m, min(k, m), 0)
        bits_1[0] = _flipped(last)
        bar = max(floats_1[0], np.float32(0))  # what lies below zero is not active, whether selected or not
        bits_1[0] = _flipped(t)
        if m >= n or bar - floats_1[0] >= guard * np.sqrt(square / np.float32(m)) or not (square < np.inf):
            break
        need = min(n, 2 * need)
        again += 1
    # Winners to the front: all above the k-th, then those equal to it, in order.
    ties = min(k, m)
    for c in range(m):
        if order_C[c] > last:
            ties -= 1
    taken = 0
    for c in range(m):
        keep = order_C[c] > last
        if order_C[c] == last and ties > 0:
            ties -= 1
            keep = True
        if keep and order_C[c] > 0:
            found_C[taken], value_C[taken] = found_C[c], value_C[c]
            taken += 1
    return taken, m, again


@jit
def select_rows(
    start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, by_size, x_BD, W_enc_FD, b_enc_F, k, r, guard, index_BK, value_BK,
    exact_B, again_B,
):  # fmt: skip
    """The top k of rows start … stop − 1, whose scores begin at row `at` of the batch. A place that is not filled has the value 0 at latent 0."""
    n = W_enc_FD.shape[0]
    keys_F = np.empty(n, np.int32)
    floats_F = keys_F.view(np.float32)
    maxima_G, found_C, value_C, order_C = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n, np.int32)
    bits_1 = np.empty(1, np.int32)
    floats_1 = bits_1.view(np.float32)
    for b in range(start, stop):
        _load_keys(kind, by_size, scores32_CF[b - at], scores16_CF[b - at], scale_F, row_scale_B[b], b_enc_F, keys_F, floats_F)
        taken, m, again = _select(
            x_BD[b], W_enc_FD, b_enc_F, keys_F, by_size, k, r, guard, maxima_G, found_C, value_C, order_C, floats_1, bits_1
        )
        exact_B[b], again_B[b] = m, again
        for j in range(taken):
            index_BK[b, j], value_BK[b, j] = found_C[j], value_C[j]
        for j in range(taken, k):
            index_BK[b, j], value_BK[b, j] = 0, 0


@jit
def group_rows(
    start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, x_BD, W_enc_FD, b_enc_F, k, guard, index_BK, value_BK, exact_B
):  # fmt: skip
    """The largest of each of k contiguous groups of latents, through a ReLU. Every latent whose score comes within `guard` root mean square
    errors of the exact value of its group's best score is computed exactly."""
    n = W_enc_FD.shape[0]
    size = n // k
    keys_F = np.empty(n, np.int32)
    floats_F = keys_F.view(np.float32)
    best_K, value_K = np.empty(k, np.int64), np.empty(k, np.float32)
    for b in range(start, stop):
        _load_keys(kind, False, scores32_CF[b - at], scores16_CF[b - at], scale_F, row_scale_B[b], b_enc_F, keys_F, floats_F)
        for j in range(k):
            best = j * size
            for f in range(j * size, (j + 1) * size):
                if keys_F[f] > keys_F[best]:
                    best = f
            best_K[j] = best
        for f in range(n):
            keys_F[f] = _flipped(keys_F[f])
        _dots(x_BD[b], W_enc_FD, best_K, k, value_K)
        square, m = np.float32(0), k
        for j in range(k):
            value_K[j] += b_enc_F[best_K[j]]
            miss = value_K[j] - floats_F[best_K[j]]
            square += miss * miss
        slack = guard * np.sqrt(square / np.float32(k))
        for j in range(k):
            first, bar = best_K[j], value_K[j] - slack
            for f in range(j * size, (j + 1) * size):
                if f != first and (floats_F[f] >= bar or not (slack < np.inf)):
                    value = _dot(x_BD[b], W_enc_FD[f]) + b_enc_F[f]
                    m += 1
                    if value > value_K[j]:
                        best_K[j], value_K[j] = f, value
            index_BK[b, j], value_BK[b, j] = best_K[j], max(value_K[j], np.float32(0))
        exact_B[b] = m


# Selection over a batch


@jit
def collect_rows(start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, b_enc_F, low, index_BM, score_BM, count_B):
    """All latents of each row whose score is at least `low` (float32), with their scores. A row with more than there are places stops there,
    and counts one more."""
    n, places = scale_F.shape[0], index_BM.shape[1]
    keys_F = np.empty(n, np.int32)
    floats_F = keys_F.view(np.float32)
    for b in range(start, stop):
        _load_keys(kind, False, scores32_CF[b - at], scores16_CF[b - at], scale_F, row_scale_B[b], b_enc_F, keys_F, floats_F)
        bound = _key(low)
        m = 0
        for first in range(0, n, 64):
            last = min(n, first + 64)
            top = np.int32(-2147483648)
            for f in range(first, last):
                top = keys_F[f] if keys_F[f] > top else top
            if top >= bound:
                for f in range(first, last):
                    if keys_F[f] >= bound:
                        if m < places:
                            index_BM[b, m] = f
                            keys_F[m] = keys_F[f]  # m ≤ f: what stood there has been read
                        m += 1
        count_B[b] = min(m, places + 1)
        for c in range(min(m, places)):
            keys_F[c] = _flipped(keys_F[c])
        for c in range(min(m, places)):
            score_BM[b, c] = floats_F[c]


@jit
def _key(value):
    one = np.empty(1, np.float32)
    one[0] = value
    return _flipped(one.view(np.int32)[0])


@jit
def exact_rows(start, stop, x_BD, W_enc_FD, b_enc_F, index_BM, score_BM, count_B, low_B, high, value_BM, unit_B, error_B, exact_B):
    """Exact values of the collected latents with low_B[b] ≤ score < high; error_B[b] += Σ ((value − score) / unit_b)², exact_B[b] += how many."""
    places = index_BM.shape[1]
    place_M, wanted_M, found_M = np.empty(places, np.int64), np.empty(places, np.int64), np.empty(places, np.float32)
    for b in range(start, stop):
        m = 0
        for c in range(count_B[b]):
            if score_BM[b, c] >= low_B[b] and score_BM[b, c] < high:
                place_M[m], wanted_M[m] = c, index_BM[b, c]
                m += 1
        _dots(x_BD[b], W_enc_FD, wanted_M, m, found_M)
        total = np.float32(0)
        for j in range(m):
            value = found_M[j] + b_enc_F[wanted_M[j]]
            value_BM[b, place_M[j]] = value
            miss = (value - score_BM[b, place_M[j]]) / unit_B[b]
            total += miss * miss
        error_B[b] += total
        exact_B[b] += m


@jit
def pack_rows(start, stop, cut, index_BM, value_BM, count_B, index_BK, value_BK):
    """The pairs whose value is positive and at least `cut`, to the front of each row; zeros behind them."""
    for b in range(start, stop):
        m = 0
        for c in range(count_B[b]):
            if value_BM[b, c] >= cut and value_BM[b, c] > 0:
                index_BK[b, m], value_BK[b, m] = index_BM[b, c], value_BM[b, c]
                m += 1
        for j in range(m, index_BK.shape[1]):
            index_BK[b, j], value_BK[b, j] = 0, 0


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
        _weighted_sum(value_K, W_dec_FD, index_K, n, e_D)
        error_B[b] = _dot(e_D, e_D)
        for i in range(d):
            g_D[i] = np.float32(-2) * weight * e_D[i]
        _dots(g_D, W_dec_FD, index_K, n, delta_K)
        for j in range(n):
            delta_BK[b, active_K[j]] = delta_K[j]


@jit
def row_norms(start, stop, x_BD, norm_B):
    """|x| of rows start … stop − 1."""
    for b in range(start, stop):
        norm_B[b] = np.sqrt(_dot(x_BD[b], x_BD[b]))


# Latents: pairs grouped by latent, gradients, clipping, Adam, norm


@jit
def group_pairs(index_N, value_N, width, offset_F, row_N, place_N):
    """Counting sort of the pairs of value ≠ 0 by latent, rows ascending. Pairs of f: offset_F[f] … offset_F[f + 1] − 1."""
    n = offset_F.shape[0] - 1
    for f in range(n + 1):
        offset_F[f] = 0
    for p in range(index_N.shape[0]):
        if value_N[p] != 0:
            offset_F[index_N[p] + 1] += 1
    for f in range(n):
        offset_F[f + 1] += offset_F[f]
    for p in range(index_N.shape[0]):
        if value_N[p] != 0:
            q = offset_F[index_N[p]]
            row_N[q], place_N[q] = p // width, p
            offset_F[index_N[p]] = q + 1
    for f in range(n, 0, -1):  # every offset has moved to where the next one began
        offset_F[f] = offset_F[f - 1]
    offset_F[0] = 0


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
        _weighted_sum(weight_4, source_BD, row_N[first : first + n], n, total_D)
    s = slot_F[f]
    if s >= 0:
        _add(np.float32(1), extra_ED[s], total_D)
    return s >= 0 or offset_F[f + 1] > offset_F[f]


@jit
def _project(g_D, w_D):
    _add(-_dot(g_D, w_D), w_D, g_D)


@jit
def sum_latents(start, stop, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, sphere, W_FD, out_FD):
    """The gradient of latents start … stop − 1: written to out_FD if it has rows. Returns the sum of squares."""
    g_D = np.empty(source_BD.shape[1], np.float32)
    square = 0.0
    for f in range(start, stop):
        some = _sum_pairs(f, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, g_D)
        if sphere and some:
            _project(g_D, W_FD[f])
        square += _dot(g_D, g_D)
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
            total += abs(weight_N[place_N[q]]) * norm_B[row_N[q]]
        if slot_F[f] >= 0:
            total += extra_norm_E[slot_F[f]]
        square += total * total
    return square


@jit
def _adam(p_D, m_D, v_D, g_D, factor, beta1, beta2, size, spread, eps):
    one = np.float32(1)
    for i in range(p_D.shape[0]):
        g = g_D[i] * factor
        m = m_D[i] + (one - beta1) * (g - m_D[i])
        v = v_D[i] * beta2 + (one - beta2) * g * g
        m_D[i] = m
        v_D[i] = v
        p_D[i] -= size * m / (np.sqrt(v) / spread + eps)


@jit
def update_latents(
    start, stop, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, sphere, tiny, W_FD, m_FD, v_FD, factor, beta1, beta2,
    size, spread, eps, kind, smooth_D, low16_FD, low8_FD, low_scale_F,
):  # fmt: skip
    """Gradient, projection, Adam, unit norm and low-precision copy of latents start … stop − 1, each while its row is in cache."""
    d = W_FD.shape[1]
    g_D, scaled_D = np.empty(d, np.float32), np.empty(d, np.float32)
    bits_D = scaled_D.view(np.int32)
    for f in range(start, stop):
        w_D = W_FD[f]
        some = _sum_pairs(f, offset_F, row_N, place_N, weight_N, source_BD, slot_F, extra_ED, g_D)
        if sphere and some:
            _project(g_D, w_D)
        _adam(w_D, m_FD[f], v_FD[f], g_D, factor, beta1, beta2, size, spread, eps)
        if sphere:
            inverse = np.float32(1) / max(np.sqrt(_dot(w_D, w_D)), tiny)
            for i in range(d):
                w_D[i] *= inverse
        _shadow(w_D, kind, smooth_D, low16_FD, low8_FD, low_scale_F, f, scaled_D, bits_D)
