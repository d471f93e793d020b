"""Non-negative floats in; how many have which leading bits out: the counts behind the n-th largest of a whole batch (Triton).

    histogram     h_v = #{i : bits_i >> shift = prefix · 2¹⁰ + v}           a shared-memory histogram a program, one addition a bin to the common one

Non-negative floats are ordered as their bits, so that three passes over 31 bits (10, 10, 11) give the n-th largest exactly: each scans its
histogram from the top, and the next looks only at values that share the bits found so far.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def histogram(
    values_ptr,
    n,
    prefix_ptr,
    counts_ptr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSES: tl.constexpr,
):
    """counts int32 [BINS] += the positive values whose bits above SHIFT + log2(BINS) are `prefix` (all, where FIRST), by their next bits."""
    prefix = tl.load(prefix_ptr)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * PASSES)
    total = tl.zeros((BINS,), tl.int32)
    for i in range(PASSES):
        places = start + i * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values_ptr + places, mask=places < n, other=0.0)
        bits = value.to(tl.int32, bitcast=True)
        key = bits >> SHIFT
        counted = bits > 0
        if FIRST == 0:
            counted = counted & (key // BINS == prefix)
        total += tl.histogram(key & (BINS - 1), BINS, mask=counted)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + bins, total, mask=total > 0, sem="relaxed")  # integers: the order does not matter
