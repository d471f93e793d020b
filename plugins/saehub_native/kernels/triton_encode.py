"""Rows and encoder weights in; ranking scores with their group maxima, candidates above a threshold, and exact values of those out (Triton).

Equations, with p = x W_encᵀ + b_enc in the scores' dtype and r = max(p, 0), or |p| where the choice is by size:

    encode        s_bf = r_bf,   m_bg = max over group g of s_bf            one product with an epilogue; groups are contiguous
    finish        the epilogue alone, in place, after a library's product
    threshold     t_b = the n-th largest m_bg                               bisection over the bits of a non-negative float
    gather        candidates_b = {f : s_bf ≥ t_b, s_bf > 0}                 only groups with m_bg ≥ t_b are opened
    refine        v_bc = ⟨x_b, W_f⟩ + b_f in float32                        for the candidates alone

The n-th largest group maximum is at most the n-th largest score, so at least the n largest scores are candidates. Rows whose candidates do not
prove the choice are listed on the device, and for them alone:

    exact         p_bf in float32, for every latent
    choose        the k largest of r_bf; of equal ones the first
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
        w = tl.load(
            W_ptr + latents[None, :].to(tl.int64) * d + columns[:, None], mask=in_latents[None, :] & (columns[:, None] < d), other=0.0
        )
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
    tl.store(
        maxima_ptr + rows[:, None].to(tl.int64) * n_groups + groups[None, :], maxima, mask=in_rows[:, None] & (groups[None, :] < n_groups)
    )


@triton.jit
def finish(scores_ptr, b_ptr, maxima_ptr, n_latents, BY_SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Products [n_rows, n_latents] become scores in place; maxima as in `encode`; GROUPS groups a program."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    latents = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = latents < n_latents
    p = tl.load(scores_ptr + row * n_latents + latents, mask=inside, other=0.0).to(tl.float32)
    p += tl.load(b_ptr + latents, mask=inside, other=0.0)
    p = tl.abs(p) if BY_SIZE else tl.maximum(p, 0.0)
    scores = p.to(scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + row * n_latents + latents, scores, mask=inside)
    n_groups = tl.cdiv(n_latents, GROUP)
    maxima = tl.max(tl.where(inside, scores.to(tl.float32), 0.0), axis=1)
    tl.store(maxima_ptr + row * n_groups + groups, maxima, mask=groups < n_groups)


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
def gather(scores_ptr, maxima_ptr, threshold_ptr, indices_ptr, counts_ptr, n_latents, capacity, GROUP: tl.constexpr, GROUPS: tl.constexpr):
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
    first = tl.program_id(1) * BLOCK
    last = tl.minimum(tl.minimum(tl.load(counts_ptr + row), capacity), first + BLOCK)
    if first < last:
        x = tl.load(x_ptr + row * d + columns, mask=columns < d, other=0.0)
        for place in range(first, last):
            latent = tl.load(indices_ptr + row * capacity + place).to(tl.int64)
            w = tl.load(W_ptr + latent * d + columns, mask=columns < d, other=0.0)
            tl.store(values_ptr + row * capacity + place, tl.sum(x * w) + tl.load(b_ptr + latent))


# ---------------------------------------------------------------------- rows that the candidates do not settle
@triton.jit
def exact(
    x_ptr, W_ptr, b_ptr, rows_ptr, count_ptr, out_ptr, first, room, n_latents, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """float32 [room, n_latents]: p of the rows `rows[first + slot]`, for the slots below `count`; a program takes every so many tiles of rows,
    and ends at once where there are none."""
    slots_used = tl.minimum(tl.load(count_ptr) - first, room)
    for tile in range(tl.program_id(0), tl.cdiv(slots_used, BM), tl.num_programs(0)):
        slots = tile * BM + tl.arange(0, BM)
        live = slots < slots_used
        rows = tl.load(rows_ptr + first + slots, mask=live, other=0).to(tl.int64)
        latents = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = latents < n_latents
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, d, BK):
            columns = start + tl.arange(0, BK)
            x = tl.load(x_ptr + rows[:, None] * d + columns[None, :], mask=live[:, None] & (columns[None, :] < d), other=0.0)
            w = tl.load(
                W_ptr + latents[None, :].to(tl.int64) * d + columns[:, None], mask=inside[None, :] & (columns[:, None] < d), other=0.0
            )
            sums = tl.dot(x, w, sums, input_precision="ieee")
        p = sums + tl.load(b_ptr + latents, mask=inside, other=0.0)[None, :]
        tl.store(out_ptr + slots[:, None].to(tl.int64) * n_latents + latents[None, :], p, mask=live[:, None] & inside[None, :])


@triton.jit
def key_bits(p, inside, BY_SIZE: tl.constexpr):
    """int32: what a pre-activation is ranked by, as the bits of a non-negative float; −1 outside."""
    key = tl.abs(p) if BY_SIZE else tl.where(p > 0.0, p, 0.0)
    return tl.where(inside, key.to(tl.int32, bitcast=True), -1)


@triton.jit
def nth_largest(p_ptr, n, wanted, BY_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the `wanted`-th largest key among p[:n]; 0 where fewer are positive."""
    found = 0
    for back in range(31):
        tried = found | (1 << (30 - back))
        reached = 0
        for start in range(0, n, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            bits = key_bits(tl.load(p_ptr + columns, mask=columns < n, other=0.0), columns < n, BY_SIZE)
            reached += tl.sum((bits >= tried).to(tl.int32))
        found = tl.where(reached >= wanted, tried, found)
    return found


@triton.jit
def above(p_ptr, n, bar, BY_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys among p[:n] have more than the bits `bar`."""
    reached = 0
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        bits = key_bits(tl.load(p_ptr + columns, mask=columns < n, other=0.0), columns < n, BY_SIZE)
        reached += tl.sum((bits > bar).to(tl.int32))
    return reached


@triton.jit
def choose(p_ptr, rows_ptr, count_ptr, values_ptr, indices_ptr, first, n_latents, k, BY_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """values float32 and indices int64 [n_rows, k] of the rows `rows[first + slot]`, from p [slots, n_latents]; a program a slot."""
    slot = first + tl.program_id(0)
    if slot < tl.load(count_ptr):
        row = tl.load(rows_ptr + slot).to(tl.int64)
        p_row = p_ptr + tl.program_id(0).to(tl.int64) * n_latents
        bar = nth_largest(p_row, n_latents, k, BY_SIZE, BLOCK)
        n_above, n_tied = 0, above(p_row, n_latents, bar, BY_SIZE, BLOCK)
        for start in range(0, n_latents, BLOCK):
            latents = start + tl.arange(0, BLOCK)
            inside = latents < n_latents
            p = tl.load(p_row + latents, mask=inside, other=0.0)
            bits = key_bits(p, inside, BY_SIZE)
            higher, tied = (bits > bar).to(tl.int32), (bits == bar).to(tl.int32)
            places = tl.where(bits > bar, n_above + tl.cumsum(higher, 0) - higher, n_tied + tl.cumsum(tied, 0) - tied)
            chosen = (bits >= bar) & (places < k)
            value = p if BY_SIZE else tl.where(p > 0.0, p, 0.0)
            tl.store(values_ptr + row * k + places, value, mask=chosen)
            tl.store(indices_ptr + row * k + places, latents.to(tl.int64), mask=chosen)
            n_above += tl.sum(higher)
            n_tied += tl.sum(tied)
