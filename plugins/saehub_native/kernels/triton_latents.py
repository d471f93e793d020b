"""Selected latents in; reconstructions with their gradients, and updated weights whose gradient is never held, out (Triton).

    reconstruct   e = y − Σ_j v_j W_dec[i_j],   G = −2 w e,   δ_j = ⟨G, W_dec[i_j]⟩ [v_j ≠ 0],   Σ e²                a program a row
    latents       g_f = Σ over its pairs (b, j) of w_bj s_b  (+ a dense row),   projected: g_f − ⟨g_f, W_f⟩ W_f,
                  then one of: store g_f; Σ g_f²; the Adam step, the row renormalised, a low-precision copy written      a program a latent
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reconstruct(
    target_ptr, indices_ptr, values_ptr, W_ptr, weight, grad_ptr, delta_ptr, error_ptr, d, K: tl.constexpr, D: tl.constexpr
):
    """target [n_rows, d] becomes the residual in place; grad [n_rows, d], delta [n_rows, K], error [n_rows], all float32; D ≥ d a power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < d
    residual = tl.load(target_ptr + row * d + columns, mask=inside, other=0.0)
    for j in range(K):
        value = tl.load(values_ptr + row * K + j)
        if value != 0.0:
            latent = tl.load(indices_ptr + row * K + j)
            residual -= value * tl.load(W_ptr + latent * d + columns, mask=inside, other=0.0)
    tl.store(target_ptr + row * d + columns, residual, mask=inside)
    tl.store(error_ptr + row, tl.sum(residual * residual))
    grad = -2.0 * weight * residual
    tl.store(grad_ptr + row * d + columns, grad, mask=inside)
    for j in range(K):
        latent = tl.load(indices_ptr + row * K + j)
        delta = tl.sum(grad * tl.load(W_ptr + latent * d + columns, mask=inside, other=0.0))
        tl.store(delta_ptr + row * K + j, tl.where(tl.load(values_ptr + row * K + j) != 0.0, delta, 0.0))


STORE, SQUARE, UPDATE = 0, 1, 2
"""What `latents` does with a gradient's row."""


@triton.jit
def latents(
    offsets_ptr, counts_ptr, rows_ptr, order_ptr, weights_ptr, source_ptr, slots_ptr, extra_ptr, W_ptr, m_ptr, v_ptr, out_ptr,
    d, factor, beta1, beta2, size, spread, eps, tiny, SPHERE: tl.constexpr, EXTRA: tl.constexpr, SHADOW: tl.constexpr, MODE: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One latent of W [n, d]: pairs `offsets … offsets + counts` of (rows, weights[order]); `out` is [n, d] (0: the gradient times `factor`;
    2: the low-precision copy, if SHADOW) or [n] (1: the square of the gradient's norm, before `factor`)."""
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
    g = g * factor
    if MODE == 0:
        tl.store(out_ptr + latent * d + columns, g, mask=inside)
    if MODE == 2:
        m = tl.load(m_ptr + latent * d + columns, mask=inside, other=0.0)
        v = tl.load(v_ptr + latent * d + columns, mask=inside, other=0.0)
        m += (g - m) * (1.0 - beta1)
        v = v * beta2 + (1.0 - beta2) * g * g
        W -= size * m / (tl.sqrt(v) / spread + eps)
        if SPHERE:
            W = W / tl.maximum(tl.sqrt(tl.sum(W * W)), tiny)
        tl.store(m_ptr + latent * d + columns, m, mask=inside)
        tl.store(v_ptr + latent * d + columns, v, mask=inside)
        tl.store(W_ptr + latent * d + columns, W, mask=inside)
        if SHADOW:
            tl.store(out_ptr + latent * d + columns, W.to(out_ptr.dtype.element_ty), mask=inside)
