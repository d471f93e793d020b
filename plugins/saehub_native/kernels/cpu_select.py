"""Scores of rows in; the latents that the float32 pre-activations select, and their values, out: compiled loops.

Every function works on a range of rows, and its result for one row depends on nothing outside it. `need`, `r` and `guard` are explained in
cpu.py. Scores are approximate pre-activations, ordered as integers: for the bits b of a float32, `b ^ ((b >> 31) & 0x7fffffff)` is an int32
of the same order, and the same operation leads back.
"""

from __future__ import annotations

import numpy as np

from saehub_native.kernels.cpu_arithmetic import LINE, dot, dots, jit, prefetch

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
LANES = 64
BINS = 11  # bits: three rounds make 32


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
def group_size(n, need):
    """Members of a group, such that there are clearly more groups than wanted entries."""
    group = 16
    while group > 1 and n // group < 4 * need:
        group >>= 1
    return group if group > 2 else 1


@jit
def _flipped(key):
    return np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit
def _float(bits):
    return np.int32(bits).view(np.float32)


@jit
def _bits(value):
    return np.float32(value).view(np.int32)


@jit
def _reaching(kind, mask, scores32_F, scores16_F, scale_F, row_scale, b_enc_F, first, stop, bound, m, found_C, score_C):
    """Append the latents first, first + LANES, … < stop whose score is at least `bound`, and their scores; returns how many there are now."""
    for f in range(first, stop, LANES):
        if kind == INT8:
            score = np.float32(scores32_F[f]) * (scale_F[f] * row_scale) + b_enc_F[f]
        elif kind == BFLOAT16:
            score = _float(np.int32(scores16_F[f]) << np.int32(16)) + b_enc_F[f]
        else:
            score = _float(scores32_F[f]) + b_enc_F[f]
        score = _float(_bits(score) & mask)
        found_C[m], score_C[m] = f, score  # written in any case: a branch that nobody can predict takes longer
        m += np.int64(not score < bound)  # what is not a number is seen
    return m


@jit
def _maxima(kind, mask, scores32_CF, scores16_CF, row, scale_F, row_scale, b_enc_F, group, maxima_G, found_G):
    """The largest score of each group of a row; returns how many groups. The next row is asked for meanwhile: scores of a chunk come from memory.

    A block of LANES · group latents holds LANES groups, the members of each LANES apart, so that comparisons vectorise and an opened group
    lies close together. Latents beyond the last whole block are groups of one.
    """
    n, block = b_enc_F.shape[0], LANES * group
    scores32_F, scores16_F, following = scores32_CF[row], scores16_CF[row], min(row + 1, scores32_CF.shape[0] - 1)
    filled = 0
    for first in range(0, n - block + 1, block):
        top_L = maxima_G[filled : filled + LANES]
        for i in range(LANES):
            top_L[i] = -np.inf
        for f in range(first, first + block, LANES):
            b_L = b_enc_F[f : f + LANES]
            if kind == BFLOAT16:
                for i in range(f, f + LANES, 2 * LINE):
                    prefetch(scores16_CF, following, i)
            else:
                for i in range(f, f + LANES, LINE):
                    prefetch(scores32_CF, following, i)
            if kind == INT8:
                s_L, scale_L = scores32_F[f : f + LANES], scale_F[f : f + LANES]
                for i in range(LANES):
                    v = _float(_bits(np.float32(s_L[i]) * (scale_L[i] * row_scale) + b_L[i]) & mask)
                    top_L[i] = v if v > top_L[i] else top_L[i]
            elif kind == BFLOAT16:
                h_L = scores16_F[f : f + LANES]
                for i in range(LANES):
                    v = _float(_bits(_float(np.int32(h_L[i]) << np.int32(16)) + b_L[i]) & mask)
                    top_L[i] = v if v > top_L[i] else top_L[i]
            else:
                s_L = scores32_F[f : f + LANES]
                for i in range(LANES):
                    v = _float(_bits(_float(s_L[i]) + b_L[i]) & mask)
                    top_L[i] = v if v > top_L[i] else top_L[i]
        filled += LANES
    for f in range(filled * group, n):
        maxima_G[filled] = -np.inf
        _reaching(kind, mask, scores32_F, scores16_F, scale_F, row_scale, b_enc_F, f, f + 1, np.float32(-np.inf), filled, found_G, maxima_G)
        filled += 1
    return filled


@jit
def _open(kind, by_size, scores32_CF, scores16_CF, row, scale_F, row_scale, b_enc_F, need, maxima_G, found_C, score_C):
    """The latents of a row whose score is at least t, and their scores, for a t that at least `need` of them reach. Returns their number and t.

    t is (nearly) the need-th largest of the maxima of groups, so at least `need` latents reach it; only groups that reach it are opened.
    """
    n, scores32_F, scores16_F = b_enc_F.shape[0], scores32_CF[row], scores16_CF[row]
    group = group_size(n, need)
    whole = n // (LANES * group) * LANES
    mask = np.int32(0x7FFFFFFF) if by_size else np.int32(-1)
    filled = _maxima(kind, mask, scores32_CF, scores16_CF, row, scale_F, row_scale, b_enc_F, group, maxima_G, found_C)
    keys_G = maxima_G.view(np.int32)
    for i in range(filled):
        keys_G[i] = _flipped(keys_G[i])
    key = _threshold(keys_G, filled, need, max(need >> 5, min(need >> 3, 8)))
    t = _float(_flipped(key))
    t -= abs(t) * np.float32(1e-6)  # a score is computed twice, and may be rounded in two ways
    m = 0
    if group == 1:
        for i in range(filled):  # written in any case: a branch that nobody can predict takes longer
            found_C[m], score_C[m] = i, _float(_flipped(keys_G[i]))
            m += np.int64(keys_G[i] >= key)
        return m, t
    for i in range(filled):
        if keys_G[i] >= key:
            first = (i // LANES) * LANES * group + i % LANES if i < whole else whole * (group - 1) + i
            stop = first + (group * LANES if i < whole else 1)
            m = _reaching(kind, mask, scores32_F, scores16_F, scale_F, row_scale, b_enc_F, first, stop, t, m, found_C, score_C)
    return m, t


@jit
def _computed(x_D, W_enc_FD, b_enc_F, by_size, level, done, m, found_C, score_C, value_C, square):
    """Compute the candidates done … m − 1 whose score is at least `level`, and move them to the front of those. Returns how many candidates are
    computed now, and `square` plus the squares of (value − score)."""
    first = done
    for c in range(first, m):
        if not score_C[c] < level:
            found_C[c], found_C[done] = found_C[done], found_C[c]
            score_C[c], score_C[done] = score_C[done], score_C[c]
            done += 1
    dots(x_D, W_enc_FD, found_C[first:done], done - first, value_C[first:done], True)
    for c in range(first, done):
        value = value_C[c] + b_enc_F[found_C[c]]
        value_C[c] = value
        miss = (abs(value) if by_size else value) - score_C[c]
        square += miss * miss
    return done, square


@jit
def _kth_largest(value_C, by_size, done, k, order_C):
    """The k-th largest value (or absolute value), as an ordered integer; order_C gets all of them."""
    bits_C = value_C.view(np.int32)
    for c in range(done):
        b = bits_C[c] & np.int32(0x7FFFFFFF) if by_size else bits_C[c]
        order_C[c] = _flipped(b)
    t = _threshold(order_C, done, min(k, done), 0)
    last = np.int32(2147483647)
    for c in range(done):  # `t` lies between it and the next smaller one
        last = order_C[c] if t <= order_C[c] < last else last
    return last


@jit
def _keep_best(order_C, last, k, found_C, value_C, count, kept_C, kept_value_C):
    """The k of `count` whose order is above `last`, the k-th largest, then those equal to it, in the order they stand in; none of order 0. Returns how many.

    kept_C and kept_value_C may be found_C and value_C.
    """
    ties, taken = k, 0
    for c in range(count):
        ties -= 1 if order_C[c] > last else 0
    for c in range(count):
        keep = order_C[c] > last
        if order_C[c] == last and ties > 0:
            ties -= 1
            keep = True
        if keep and order_C[c] > 0:
            kept_C[taken], kept_value_C[taken] = found_C[c], value_C[c]
            taken += 1
    return taken


@jit
def _decide(x_D, W_enc_FD, b_enc_F, by_size, k, guard, t, m, found_C, score_C, value_C, order_C):
    """Compute the k best of m candidates, then all down to `guard` root mean square errors below the k-th exact value. Returns how many are computed, first
    in found_C and value_C, and whether the candidates reach so far down: they are all latents with a score of at least t."""
    bits_C = score_C.view(np.int32)
    for c in range(m):
        order_C[c] = _flipped(bits_C[c])
    level = _float(_flipped(_threshold(order_C, m, min(k, m), 0)))
    done, square = 0, np.float32(0)
    while True:
        done, square = _computed(x_D, W_enc_FD, b_enc_F, by_size, level, done, m, found_C, score_C, value_C, square)
        last = _kth_largest(value_C, by_size, done, k, order_C)
        bar = max(_float(_flipped(last)), np.float32(0))  # what lies below zero is not active, selected or not
        wanted = bar - guard * np.sqrt(square / np.float32(done))
        if wanted >= level or not (square < np.inf):
            return done, True
        if level == t:
            return done, False
        level = max(wanted, t)


@jit
def _winners(by_size, k, done, found_C, value_C, order_C, spare_C):
    """Winners to the front: all above the k-th, then those equal to it; latents ascend, so that nothing after this depends on the scores.

    A latent's place is the number of smaller ones: many comparisons, but no branch that a processor has to guess."""
    for c in range(done):
        order_C[c], spare_C[c] = found_C[c], value_C[c]
    for c in range(done):
        place, latent = np.int32(0), order_C[c]
        for j in range(done):
            place += np.int32(order_C[j] < latent)
        found_C[place], value_C[place] = latent, spare_C[c]
    last = _kth_largest(value_C, by_size, done, k, order_C)
    return _keep_best(order_C, last, min(k, done), found_C, value_C, done, found_C, value_C)


@jit
def _write(b, taken, k, found_C, value_C, index_BK, value_BK):
    """A row's selection. A place that is not filled has the value 0 at latent 0."""
    for j in range(taken):
        index_BK[b, j], value_BK[b, j] = found_C[j], value_C[j]
    for j in range(taken, k):
        index_BK[b, j], value_BK[b, j] = 0, 0


@jit
def _select(
    x_D, W_enc_FD, b_enc_F, kind, by_size, scores32_CF, scores16_CF, row, scale_F, row_scale, k, r, guard, maxima_G, found_C, score_C, value_C, order_C
):  # fmt: skip
    """The float32 top k of a row (by |p| if `by_size`): candidates by score, decided by exact values.

    k + r candidates are at hand (all latents with a score ≥ t), the best k of them are computed exactly, then all down to `guard` root mean
    square errors below the k-th exact value; where that is below t, twice as many candidates are taken.
    The winners come first in found_C and value_C, latents ascending; those that a ReLU sets to zero are left out. Returns how many there are, how many
    values were computed exactly, and how often the candidates had to be doubled.
    """
    n = b_enc_F.shape[0]
    need, again, total = min(n, k + r), 0, 0
    while True:
        m, t = _open(kind, by_size, scores32_CF, scores16_CF, row, scale_F, row_scale, b_enc_F, need, maxima_G, found_C, score_C)
        done, enough = _decide(x_D, W_enc_FD, b_enc_F, by_size, k, guard, t, m, found_C, score_C, value_C, order_C)
        total += done
        if enough or m >= n or need >= n:
            break
        need = min(n, 2 * need)
        again += 1
    return _winners(by_size, k, done, found_C, value_C, order_C, score_C), total, again


@jit
def select_rows(
    start, stop, at, kind, scores32_CF, scores16_CF, scale_F, row_scale_B, by_size, x_BD, W_enc_FD, b_enc_F, k, r, guard, index_BK, value_BK,
    exact_B, again_B,
):  # fmt: skip
    """The top k of rows start … stop − 1, whose scores begin at row `at` of the batch. A place that is not filled has the value 0 at latent 0."""
    n = W_enc_FD.shape[0]
    maxima_G, score_C, value_C = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    found_C, order_C = np.empty(n, np.int64), np.empty(n, np.int32)
    for b in range(start, stop):
        taken, m, again = _select(
            x_BD[b], W_enc_FD, b_enc_F, kind, by_size, scores32_CF, scores16_CF, b - at, scale_F, row_scale_B[b], k, r, guard,
            maxima_G, found_C, score_C, value_C, order_C,
        )  # fmt: skip
        exact_B[b], again_B[b] = m, again
        _write(b, taken, k, found_C, value_C, index_BK, value_BK)


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
        dots(x_BD[b], W_enc_FD, best_K, k, value_K, True)
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
                    value = dot(x_BD[b], W_enc_FD[f]) + b_enc_F[f]
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
def exact_rows(start, stop, x_BD, W_enc_FD, b_enc_F, index_BM, score_BM, count_B, low_B, high, fresh, value_BM, unit_B, error_B, exact_B):
    """Exact values of the collected latents with low_B[b] ≤ score < high; error_B[b] += Σ ((value − score) / unit_b)², exact_B[b] += how many.
    `fresh`: the others' values are −∞ from now on."""
    places = index_BM.shape[1]
    place_M, wanted_M, found_M = np.empty(places, np.int64), np.empty(places, np.int64), np.empty(places, np.float32)
    for b in range(start, stop):
        m = 0
        if fresh:
            value_BM[b, : count_B[b]] = -np.inf
        for c in range(count_B[b]):
            if score_BM[b, c] >= low_B[b] and score_BM[b, c] < high:
                place_M[m], wanted_M[m] = c, index_BM[b, c]
                m += 1
        dots(x_BD[b], W_enc_FD, wanted_M, m, found_M, True)
        total = np.float32(0)
        for j in range(m):
            value = found_M[j] + b_enc_F[wanted_M[j]]
            value_BM[b, place_M[j]] = value
            miss = (value - score_BM[b, place_M[j]]) / unit_B[b]
            total += miss * miss
        error_B[b] += total
        exact_B[b] += m


@jit
def histogram_rows(start, stop, value_BM, count_B, positive, prefix, shift, histogram_N):
    """Of the first count_B[b] values of each row (those above 0 if `positive`), in the order of unsigned integers: how many have which `BINS` bits from
    `shift` on, among those whose bits above are those of `prefix`."""
    bits_BM = value_BM.view(np.int32)
    above = shift + BINS
    for b in range(start, stop):
        for c in range(count_B[b]):
            key = np.int64(_flipped(bits_BM[b, c])) + (np.int64(1) << 31)
            if key >> above == prefix >> above and (value_BM[b, c] > 0 or not positive):
                histogram_N[(key >> shift) & ((1 << BINS) - 1)] += 1


@jit
def fullest_row(start, stop, cut, value_BM, count_B):
    """The most that a row has of positive values of at least `cut`."""
    most = 0
    for b in range(start, stop):
        m = 0
        for c in range(count_B[b]):
            m += np.int64(value_BM[b, c] >= cut and value_BM[b, c] > 0)
        most = max(most, m)
    return most


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


