"""Rows and encoder weights in; ranking scores with their group maxima, candidates above a threshold, and exact values of those out (Triton).

Equations, with p = x W_encᵀ + b_enc in the scores' dtype and r = max(p, 0), or |p| where the choice is by size:

    encode        s_bf = r_bf,   m_bg = max over group g of s_bf            one product with an epilogue; groups are contiguous
    threshold     t_b = the n-th largest m_bg                               bisection over the bits of a non-negative float
    gather        candidates_b = {f : s_bf ≥ t_b, s_bf > 0}                 only groups with m_bg ≥ t_b are opened
    refine        v_bc = ⟨x_b, W_f⟩ + b_f in float32                        for the candidates alone

The n-th largest group maximum is at most the n-th largest score, so at least the n largest scores are candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode(
    x_ptr, W_ptr, b_ptr, scores_ptr, maxima_ptr, n_rows, n_latents, d,
    UPCAST: tl.constexpr, BY_SIZE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [n_rows, d] and W [n_latents, d] in one dtype, b float32 → scores [n_rows, n_latents], maxima float32 [n_rows, ⌈n_latents/GROUP⌉]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    latents = tl.program_id(1) * BN + tl.arange(0, BN)
    in_rows, in_latents = rows < n_rows, latents < n_latents
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BK):
        columns = start + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * d + columns[None, :], mask=in_rows[:, None] & (columns[None, :] < d), other=0.0)
        w = tl.load(W_ptr + latents[None, :].to(tl.int64) * d + columns[:, None], mask=in_latents[None, :] & (columns[:, None] < d), other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
            x, w = x.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(x, w, sums, input_precision="ieee")
    p = sums + tl.load(b_ptr + latents, mask=in_latents, other=0.0)[None, :]
    p = tl.abs(p) if BY_SIZE else tl.maximum(p, 0.0)
    p = tl.where(in_latents[None, :], p, 0.0)
    scores = p.to(scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + rows[:, None].to(tl.int64) * n_latents + latents[None, :], scores, mask=in_rows[:, None] & in_latents[None, :])
    maxima = tl.max(tl.reshape(scores.to(tl.float32), (BM, BN // GROUP, GROUP)), axis=2)
    n_groups = tl.cdiv(n_latents, GROUP)
    groups = tl.program_id(1) * (BN // GROUP) + tl.arange(0, BN // GROUP)
    tl.store(maxima_ptr + rows[:, None].to(tl.int64) * n_groups + groups[None, :], maxima, mask=in_rows[:, None] & (groups[None, :] < n_groups))


@triton.jit
def threshold(maxima_ptr, out_ptr, n_groups, wanted, BLOCK: tl.constexpr):
    """float32 [n_rows]: the `wanted`-th largest maximum of each row, 0 where fewer are positive; BLOCK ≥ n_groups, a power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    bits = tl.load(maxima_ptr + row * n_groups + columns, mask=columns < n_groups, other=0.0).to(tl.int32, bitcast=True)
    found = 0
    for bit in tl.static_range(30, -1, -1):  # non-negative floats are ordered as their bits
        tried = found | (1 << bit)
        found = tl.where(tl.sum((bits >= tried).to(tl.int32)) >= wanted, tried, found)
    tl.store(out_ptr + row, found.to(tl.float32, bitcast=True))


@triton.jit
def gather(
    scores_ptr, maxima_ptr, threshold_ptr, indices_ptr, counts_ptr, n_latents, capacity, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    """Candidates of each row in ascending order: int32 [n_rows, capacity] (what lies beyond is cut off), and how many there are."""
    row = tl.program_id(0).to(tl.int64)
    bar = tl.load(threshold_ptr + row)
    n_groups = tl.cdiv(n_latents, GROUP)
    count = 0
    for start in range(0, n_groups, GROUPS):
        groups = start + tl.arange(0, GROUPS)
        maxima = tl.load(maxima_ptr + row * n_groups + groups, mask=groups < n_groups, other=0.0)
        opened = (maxima >= bar) & (maxima > 0.0)
        if tl.sum(opened.to(tl.int32)) > 0:
            latents = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            mask = opened[:, None] & (latents < n_latents)
            scores = tl.load(scores_ptr + row * n_latents + latents, mask=mask, other=0.0).to(tl.float32)
            flat = tl.reshape(mask & (scores >= bar) & (scores > 0.0), (GROUPS * GROUP,))
            chosen = flat.to(tl.int32)
            places = count + tl.cumsum(chosen, 0) - chosen
            tl.store(indices_ptr + row * capacity + places, tl.reshape(latents, (GROUPS * GROUP,)), mask=flat & (places < capacity))
            count += tl.sum(chosen)
    tl.store(counts_ptr + row, count)


@triton.jit
def refine(x_ptr, W_ptr, b_ptr, indices_ptr, counts_ptr, values_ptr, d, capacity, BLOCK: tl.constexpr, D: tl.constexpr):
    """float32 [n_rows, capacity]: ⟨x, W_f⟩ + b_f of each candidate; BLOCK candidates a program, D ≥ d a power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    x = tl.load(x_ptr + row * d + columns, mask=columns < d, other=0.0)
    first = tl.program_id(1) * BLOCK
    last = tl.minimum(tl.minimum(tl.load(counts_ptr + row), capacity), first + BLOCK)
    for place in range(first, last):
        latent = tl.load(indices_ptr + row * capacity + place).to(tl.int64)
        w = tl.load(W_ptr + latent * d + columns, mask=columns < d, other=0.0)
        tl.store(values_ptr + row * capacity + place, tl.sum(x * w) + tl.load(b_ptr + latent))
