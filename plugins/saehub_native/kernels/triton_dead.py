"""Residuals and a list of dead latents on the device in; what AuxK would add to them, and its gradients, out (Triton).

Over the latents `list[:count]`, for a chunk of rows at a time (equations as in architectures/auxk.py; N dead latents, a [rows, N] float32):

    scores        a = r(x' W_encᵀ + b_enc),  r(p) = max(p, 0), or p itself                              a product with gathered weights
    keep          a ← a where |a| is among the row's k_aux largest, else 0
    miss          R = a W_dec − e,   G = 2α R / spread,   Σ R²
    gradients     ∂W_dec (+)= aᵀ G
    scores        a ← (G W_decᵀ)·[a ≠ 0] = δ
    gradients     ∂W_enc (+)= δᵀ x',   ∂b_enc (+)= Σ_b δ_b

`count` is read on the device: a program takes every so many tiles of dead latents, so that a launch has the same shape whatever is dead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saehub_native.kernels.triton_encode import above, key_bits, nth_largest

RELU, SIGNED, MASK = 0, 1, 2
"""What `scores` makes of its products."""


@triton.jit
def scores(
    a_ptr, W_ptr, b_ptr, list_ptr, count_ptr, acts_ptr, n_rows, stride, d,
    MODE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a [n_rows, d] · W[list]ᵀ into acts [n_rows, stride]: + b and a ReLU (0), + b (1), or times [acts ≠ 0] (2)."""
    count = tl.load(count_ptr)
    for tile in range(tl.program_id(1), tl.cdiv(count, BN), tl.num_programs(1)):
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        places = tile * BN + tl.arange(0, BN)
        in_rows, live = rows < n_rows, places < count
        latents = tl.load(list_ptr + places, mask=live, other=0).to(tl.int64)
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, d, BK):
            columns = start + tl.arange(0, BK)
            a = tl.load(
                a_ptr + rows[:, None].to(tl.int64) * d + columns[None, :], mask=in_rows[:, None] & (columns[None, :] < d), other=0.0
            )
            w = tl.load(W_ptr + latents[None, :] * d + columns[:, None], mask=live[None, :] & (columns[:, None] < d), other=0.0)
            sums = tl.dot(a, w, sums, input_precision=PRECISION)
        here = acts_ptr + rows[:, None].to(tl.int64) * stride + places[None, :]
        inside = in_rows[:, None] & live[None, :]
        if MODE == 2:
            sums = tl.where(tl.load(here, mask=inside, other=0.0) != 0.0, sums, 0.0)
        else:
            sums += tl.load(b_ptr + latents, mask=live, other=0.0)[None, :]
            if MODE == 0:
                sums = tl.where(sums > 0.0, sums, 0.0)
        tl.store(here, sums, mask=inside)


@triton.jit
def keep(acts_ptr, count_ptr, stride, wanted, BLOCK: tl.constexpr):
    """All but the `wanted` largest of a row by |a| become 0, of equal ones the first stay; a program a row."""
    count = tl.load(count_ptr)
    if count > wanted:
        row_ptr = acts_ptr + tl.program_id(0).to(tl.int64) * stride
        bar = nth_largest(row_ptr, count, wanted, True, BLOCK)
        tied_before = above(row_ptr, count, bar, True, BLOCK)
        for start in range(0, count, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < count
            bits = key_bits(tl.load(row_ptr + places, mask=inside, other=0.0), inside, True)
            tied = (bits == bar).to(tl.int32)
            kept = (bits > bar) | ((bits == bar) & (tied_before + tl.cumsum(tied, 0) - tied < wanted))
            tl.store(row_ptr + places, tl.zeros((BLOCK,), tl.float32), mask=inside & (kept == 0))
            tied_before += tl.sum(tied)


@triton.jit
def miss(
    acts_ptr, W_ptr, residual_ptr, list_ptr, count_ptr, scale_ptr, grad_ptr, error_ptr, n_rows, stride, d,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """G [n_rows, d] = scale (a W[list] − e), and Σ R² of each tile: error [row tiles, column tiles]; 0 where nothing is dead."""
    count = tl.load(count_ptr)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    in_rows, in_columns = rows < n_rows, columns < d
    total = 0.0
    if count > 0:
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, count, BK):
            places = start + tl.arange(0, BK)
            live = places < count
            latents = tl.load(list_ptr + places, mask=live, other=0).to(tl.int64)
            a = tl.load(acts_ptr + rows[:, None].to(tl.int64) * stride + places[None, :], mask=in_rows[:, None] & live[None, :], other=0.0)
            w = tl.load(W_ptr + latents[:, None] * d + columns[None, :], mask=live[:, None] & in_columns[None, :], other=0.0)
            sums = tl.dot(a, w, sums, input_precision=PRECISION)
        here = rows[:, None].to(tl.int64) * d + columns[None, :]
        inside = in_rows[:, None] & in_columns[None, :]
        sums = tl.where(inside, sums - tl.load(residual_ptr + here, mask=inside, other=0.0), 0.0)
        tl.store(grad_ptr + here, sums * tl.load(scale_ptr), mask=inside)
        total += tl.sum(sums * sums)
    tl.store(error_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def gradients(
    acts_ptr, source_ptr, count_ptr, out_ptr, sums_ptr, n_rows, stride, d,
    FIRST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [N, d] = aᵀ source (+ what it held, unless FIRST), and sums [N] = Σ_b a_b likewise; BM latents and BN columns a program."""
    count = tl.load(count_ptr)
    for tile in range(tl.program_id(0), tl.cdiv(count, BM), tl.num_programs(0)):
        places = tile * BM + tl.arange(0, BM)
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        live, in_columns = places < count, columns < d
        sums = tl.zeros((BM, BN), tl.float32)
        totals = tl.zeros((BM,), tl.float32)
        for start in range(0, n_rows, BK):
            rows = start + tl.arange(0, BK)
            a = tl.load(
                acts_ptr + rows[None, :].to(tl.int64) * stride + places[:, None], mask=(rows[None, :] < n_rows) & live[:, None], other=0.0
            )
            s = tl.load(
                source_ptr + rows[:, None].to(tl.int64) * d + columns[None, :],
                mask=(rows[:, None] < n_rows) & in_columns[None, :],
                other=0.0,
            )
            sums = tl.dot(a, s, sums, input_precision=PRECISION)
            totals += tl.sum(a, 1)
        here = places[:, None].to(tl.int64) * d + columns[None, :]
        inside = live[:, None] & in_columns[None, :]
        if FIRST == 0:
            sums += tl.load(out_ptr + here, mask=inside, other=0.0)
        tl.store(out_ptr + here, sums, mask=inside)
        if tl.program_id(1) == 0:
            if FIRST == 0:
                totals += tl.load(sums_ptr + places, mask=live, other=0.0)
            tl.store(sums_ptr + places, totals, mask=live)
