"""Selected latents in; reconstructions with their gradients, and updated weights whose gradient is never held, out (Triton).

    reconstruct   e = y − Σ_j v_j W_dec[i_j],   G = −2 w e,   δ_j = ⟨G, W_dec[i_j]⟩ [v_j ≠ 0],   Σ e²                a program a row
    totals        Σ over a latent's pairs of w_bj s_b, where s is one number a row                                 a program a latent
    bound         (Σ |w_bj| |s_b| + |dense row|)² ≥ |g_f|²                                                         a program a latent
    latents       g_f = Σ over its pairs (b, j) of w_bj s_b  (+ a dense row),   projected: g_f − ⟨g_f, W_f⟩ W_f,
                  then one of: store g_f; Σ g_f²; the Adam step, the row renormalised, a low-precision copy written      a program a latent

Adam's moments are float32, or 8-bit codes in blocks of a row (optim8.py has the equations, and the same in plain torch).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reconstruct(
    target_ptr, indices_ptr, values_ptr, W_ptr, weight, grad_ptr, delta_ptr, error_ptr, d, k, K: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """target [n_rows, d] becomes the residual in place; grad [n_rows, d], delta [n_rows, k], error [n_rows], all float32; K ≥ k a power of two.

    C columns at a time: a piece of the k decoder rows is read once, for the residual there and for its part of δ.
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, K)
    there = places < k
    values = tl.load(values_ptr + row * k + places, mask=there, other=0.0)
    latents = tl.load(indices_ptr + row * k + places, mask=there, other=0)
    active = values != 0.0
    delta = tl.zeros((K,), tl.float32)
    error = tl.zeros((C,), tl.float32)
    for start in range(0, d, C):
        columns = start + tl.arange(0, C)
        inside = columns < d
        W = tl.load(W_ptr + latents[:, None] * d + columns[None, :], mask=active[:, None] & inside[None, :], other=0.0)
        residual = tl.load(target_ptr + row * d + columns, mask=inside, other=0.0) - tl.sum(values[:, None] * W, 0)
        grad = -2.0 * weight * residual
        tl.store(target_ptr + row * d + columns, residual, mask=inside)
        tl.store(grad_ptr + row * d + columns, grad, mask=inside)
        error += residual * residual
        delta += tl.sum(W * grad[None, :], 1)
    tl.store(error_ptr + row, tl.sum(error))
    tl.store(delta_ptr + row * k + places, tl.where(active, delta, 0.0), mask=there)


@triton.jit
def over_pairs(
    offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, source_ptr, latent, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ of weights[order] (of their size, if SIZE) · source[rows] over a latent's pairs."""
    start = tl.load(offsets_ptr + latent)
    stop = start + tl.load(counts_ptr + latent)
    total = 0.0
    for first in range(start, stop, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        there = pairs < stop
        weights = tl.load(weights_ptr + tl.load(order_ptr + pairs, mask=there, other=0), mask=there, other=0.0)
        if SIZE:
            weights = tl.abs(weights)
        total += tl.sum(weights * tl.load(source_ptr + tl.load(rows_ptr + pairs, mask=there, other=0), mask=there, other=0.0))
    return total


@triton.jit
def totals(offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, source_ptr, out_ptr, BLOCK: tl.constexpr):
    """float32 [n]: Σ of weights[order] · source[rows] over each latent's pairs."""
    latent = tl.program_id(0).to(tl.int64)
    total = over_pairs(offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, source_ptr, latent, False, BLOCK)
    tl.store(out_ptr + latent, total)


@triton.jit
def bound(
    offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, norms_ptr, slots_ptr, extra_ptr, out_ptr, d,
    EXTRA: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """float32 [n]: (Σ |weights[order]| norms[rows] + |extra[slot]|)²."""
    latent = tl.program_id(0).to(tl.int64)
    total = over_pairs(offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, norms_ptr, latent, True, BLOCK)
    if EXTRA:
        slot = tl.load(slots_ptr + latent).to(tl.int64)
        if slot >= 0:
            columns = tl.arange(0, D)
            row = tl.load(extra_ptr + slot * d + columns, mask=columns < d, other=0.0)
            total += tl.sqrt(tl.sum(row * row))
    tl.store(out_ptr + latent, total * total)


CODES = 256
"""Numbers that share a scale, of a row's 8-bit moments."""
ONE = 0x3F800000
"""The bits of 1.0."""


@triton.jit
def noise(index, salt):
    """32 random bits of (index, salt): two rounds of multiply and shift (C. Wellons' lowbias32)."""
    h = index.to(tl.uint32) * 0x9E3779B1 + salt.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def decoded(codes, LAST: tl.constexpr):
    """float32: 0 for code 0, else the number whose bits are ONE − (LAST − code)·2²⁰: 1 for the last code, three bits of mantissa."""
    bits = 0x3F800000 - ((LAST - codes.to(tl.int32)) << 20)
    return tl.where(codes == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def encoded(share, random, LAST: tl.constexpr, KEEP: tl.constexpr):
    """The code of a share in [0, 1], rounded up or down at random in proportion, so that its expectation is the share; KEEP: never down to 0."""
    bits = share.to(tl.int32, bitcast=True)
    lowest = 0x3F800000 - ((LAST - 1) << 20)
    code = ((bits + random - lowest) >> 20) + 1
    smallest = 1.9073486328125e-05 if LAST == 127 else 2.9103830456733704e-10  # 1.25 · 2⁻¹⁶ and 1.25 · 2⁻³²: what the bits `lowest` say
    below = tl.where(random.to(tl.float32) < share / smallest * 1048576.0, 1, 0)
    code = tl.where(bits < lowest, below, code)
    if KEEP:
        code = tl.maximum(code, 1)
    return tl.where(share > 0.0, tl.minimum(code, LAST), 0)


@triton.jit
def block_maxima(x, D: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [D]: the largest of each block of x [D], at each of its places."""
    blocks = tl.reshape(x, (D // BLOCK, BLOCK))
    return tl.reshape(tl.broadcast_to(tl.max(blocks, 1)[:, None], (D // BLOCK, BLOCK)), (D,))


STORE, SQUARE, UPDATE = 0, 1, 2
"""What `latents` does with a gradient's row."""


@triton.jit
def latents(
    offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, source_ptr, slots_ptr, extra_ptr, W_ptr, m_ptr, v_ptr,
    m_scale_ptr, v_scale_ptr, out_ptr, numbers_ptr, first, d, new1, beta2, new2, eps, tiny,
    SPHERE: tl.constexpr, EXTRA: tl.constexpr, SHADOW: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One latent of W [n, d]: pairs `offsets … offsets + counts` of (rows, weights[order]); `out` is [n, d] (0: the gradient times the factor;
    2: the low-precision copy, if SHADOW) or [n] (1: the square of the gradient's norm, before the factor, where `numbers[4]` asks for it).

    numbers: float32 [factor, size, spread, t, whether squares are wanted]. m and v: float32 [n, d], or with BITS 8 uint8 [n, d] and scales
    float32 [n, ⌈d/BLOCK⌉]. `first` is the number of the first latent in its weight.
    """
    if MODE == 1:
        wanted = tl.load(numbers_ptr + 4) != 0.0
    else:
        wanted = True
    if wanted:
        latent = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, D)
        inside = columns < d
        start = tl.load(offsets_ptr + latent)
        stop = start + tl.load(counts_ptr + latent)
        g = tl.zeros((D,), tl.float32)
        for pair in range(start, stop):  # rows ascend: the order of the sum, and so its rounding, is always the same
            weight = tl.load(weights_ptr + tl.load(order_ptr + pair))
            g += weight * tl.load(source_ptr + tl.load(rows_ptr + pair) * d + columns, mask=inside, other=0.0)
        if EXTRA:
            slot = tl.load(slots_ptr + latent).to(tl.int64)
            if slot >= 0:
                g += tl.load(extra_ptr + slot * d + columns, mask=inside, other=0.0)
        W = tl.load(W_ptr + latent * d + columns, mask=inside, other=0.0)
        if SPHERE:
            g -= tl.sum(g * W) * W
        if MODE == 1:
            tl.store(out_ptr + latent, tl.sum(g * g))
        g = g * tl.load(numbers_ptr)
        if MODE == 0:
            tl.store(out_ptr + latent * d + columns, g, mask=inside)
        if MODE == 2:
            size, spread = tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
            m = tl.load(m_ptr + latent * d + columns, mask=inside, other=0)
            v = tl.load(v_ptr + latent * d + columns, mask=inside, other=0)
            if BITS == 8:
                n_blocks = tl.cdiv(d, BLOCK)
                scales = latent * n_blocks + columns // BLOCK
                m_code, v_code = m.to(tl.int32), v.to(tl.int32)
                m = decoded(m_code & 127, 127) * tl.load(m_scale_ptr + scales, mask=inside, other=0.0)
                m = tl.where(m_code > 127, -m, m)
                v = decoded(v_code, 255) * tl.load(v_scale_ptr + scales, mask=inside, other=0.0)
            m += (g - m) * new1
            v = v * beta2 + new2 * g * g
            W -= size * m / (tl.sqrt(v) / spread + eps)
            if SPHERE:
                W = W / tl.maximum(tl.sqrt(tl.sum(W * W)), tiny)
            tl.store(W_ptr + latent * d + columns, W, mask=inside)
            if SHADOW:
                tl.store(out_ptr + latent * d + columns, W.to(out_ptr.dtype.element_ty), mask=inside)
            if BITS == 8:
                m_scale, v_scale = block_maxima(tl.abs(m), D, BLOCK), block_maxima(v, D, BLOCK)
                random = noise((first + latent) * d + columns, tl.load(numbers_ptr + 3).to(tl.int32))
                m_share = tl.abs(m) / tl.where(m_scale > 0.0, m_scale, 1.0)
                v_share = v / tl.where(v_scale > 0.0, v_scale, 1.0)
                m_new = encoded(m_share, (random & 0xFFFFF).to(tl.int32), 127, False)
                v_new = encoded(v_share, (random >> 12).to(tl.int32), 255, True)
                m_new = tl.where((m < 0.0) & (m_new > 0), m_new + 128, m_new)
                tl.store(m_ptr + latent * d + columns, m_new.to(tl.uint8), mask=inside)
                tl.store(v_ptr + latent * d + columns, v_new.to(tl.uint8), mask=inside)
                leads = inside & (columns % BLOCK == 0)
                tl.store(m_scale_ptr + scales, m_scale, mask=leads)
                tl.store(v_scale_ptr + scales, v_scale, mask=leads)
            else:
                tl.store(m_ptr + latent * d + columns, m, mask=inside)
                tl.store(v_ptr + latent * d + columns, v, mask=inside)
