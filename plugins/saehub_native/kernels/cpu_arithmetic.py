"""Float32 rows in; inner products and weighted sums of them out: the compiled arithmetic that all CPU loops share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saehub_native.kernels import compiled, instructions

FILES = ("arithmetic", "select", "loops", "wide", "scan")
jit = compiled.compiler(compiled.__file__, instructions.__file__, *(str(Path(__file__).with_name(f"cpu_{name}.py")) for name in FILES))
prefetch, _pack = instructions.prefetcher(), instructions.packer()

LINE = 16  # float32 numbers of a cache line
SPARE = instructions.WIDTH
GAPS = (1750, 701, 301, 132, 57, 23, 10, 4, 1)  # Ciura 2001, and one more


@jit
def prefetch_row(W_FD, f):
    """Ask for row f."""
    for i in range(0, W_FD.shape[1], LINE):
        prefetch(W_FD, f, i)


@jit
def dot(a, b):
    """⟨a, b⟩."""
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@jit
def add(factor, source, total):
    """total += factor · source."""
    for i in range(total.shape[0]):
        total[i] += factor * source[i]


# Four at a time: loads that overlap wait once.


@jit
def dots(a_D, W_FD, index_C, count, out_C, far):
    """out_C[c] = ⟨a, W[index_C[c]]⟩ for c < count. `far`: the rows come from beyond the second cache, so the next ones are asked for."""
    d, c = a_D.shape[0], 0
    while c < count:
        # Beyond the end the last row again: every product is computed in the same way, wherever it stands.
        c1, c2, c3 = min(c + 1, count - 1), min(c + 2, count - 1), min(c + 3, count - 1)
        p, q, r, s = W_FD[index_C[c]], W_FD[index_C[c1]], W_FD[index_C[c2]], W_FD[index_C[c3]]
        if far:
            for ahead in range(c + 4, min(c + 8, count)):
                prefetch_row(W_FD, index_C[ahead])
        t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(d):
            a = a_D[i]
            t0 += a * p[i]
            t1 += a * q[i]
            t2 += a * r[i]
            t3 += a * s[i]
        out_C[c3], out_C[c2], out_C[c1], out_C[c] = t3, t2, t1, t0
        c += 4


@jit
def weighted_sum(weight_C, W_FD, index_C, count, total_D, far):
    """total += Σ_{c < count} weight_C[c] W[index_C[c]]; `far` as in `dots`."""
    d, c, zero = total_D.shape[0], 0, np.float32(0)
    while c < count:
        # Beyond the end the last row again, with weight 0: it is at hand, and one loop does for every count.
        c1, c2, c3 = min(c + 1, count - 1), min(c + 2, count - 1), min(c + 3, count - 1)
        p, q, r, s = W_FD[index_C[c]], W_FD[index_C[c1]], W_FD[index_C[c2]], W_FD[index_C[c3]]
        if far:
            for ahead in range(c + 4, min(c + 8, count)):
                prefetch_row(W_FD, index_C[ahead])
        w0 = weight_C[c]
        w1 = weight_C[c1] if c1 == c + 1 else zero
        w2 = weight_C[c2] if c2 == c + 2 else zero
        w3 = weight_C[c3] if c3 == c + 3 else zero
        for i in range(d):
            total_D[i] += (w0 * p[i] + w1 * q[i]) + (w2 * r[i] + w3 * s[i])
        c += 4


@jit
def dots_and_sum(a_D, W_FD, index_C, count, weight_C, out_C, total_D):
    """`dots(a, …, out)` and `weighted_sum(weight, …, total)` of the same rows, whose numbers are read once."""
    d, c, zero = a_D.shape[0], 0, np.float32(0)
    while c < count:
        c1, c2, c3 = min(c + 1, count - 1), min(c + 2, count - 1), min(c + 3, count - 1)
        p, q, r, s = W_FD[index_C[c]], W_FD[index_C[c1]], W_FD[index_C[c2]], W_FD[index_C[c3]]
        w0 = weight_C[c]
        w1 = weight_C[c1] if c1 == c + 1 else zero
        w2 = weight_C[c2] if c2 == c + 2 else zero
        w3 = weight_C[c3] if c3 == c + 3 else zero
        t0, t1, t2, t3 = zero, zero, zero, zero
        for i in range(d):
            a, pi, qi, ri, si = a_D[i], p[i], q[i], r[i], s[i]
            t0 += a * pi
            t1 += a * qi
            t2 += a * ri
            t3 += a * si
            total_D[i] += (w0 * pi + w1 * qi) + (w2 * ri + w3 * si)
        out_C[c3], out_C[c2], out_C[c1], out_C[c] = t3, t2, t1, t0
        c += 4


if _pack is None:

    @jit
    def pack(keys_N, n, bound, place_C, kept_C, most):
        """The places of those of the first n that are at least `bound`, and they themselves; returns how many, or more than `most` where there are more.

        place_C and kept_C have room for `most` and `SPARE` more. All int32."""
        m = 0
        for i in range(n):
            place_C[m], kept_C[m] = i, keys_N[i]  # written in any case: a branch that nobody can predict takes longer
            m += np.int64(keys_N[i] >= bound)
            if m > most:
                break
        return m

else:

    @jit
    def pack(keys_N, n, bound, place_C, kept_C, most):
        """As above."""
        m, whole = 0, n - n % instructions.WIDTH
        for i in range(0, whole, instructions.WIDTH):
            m = _pack(keys_N, i, bound, place_C, kept_C, m)
            if m > most:
                return m
        for i in range(whole, n):
            place_C[m], kept_C[m] = i, keys_N[i]
            m += np.int64(keys_N[i] >= bound)
            if m > most:
                break
        return m


@jit
def ascending(key_C, other_C, count):
    """Sort the first `count` of both by key_C (all different), in place: Shell's sort, whose code numba compiles in a tenth of the time of np.argsort's."""
    for gap in GAPS:
        for c in range(gap, count):
            key, other, j = key_C[c], other_C[c], c
            while j >= gap and key_C[j - gap] > key:
                key_C[j], other_C[j] = key_C[j - gap], other_C[j - gap]
                j -= gap
            key_C[j], other_C[j] = key, other
