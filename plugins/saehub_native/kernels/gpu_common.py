"""Sizes and small device-side helpers that the parts of the Triton kernels share: masks and numbers in, lists and tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 6.0
GROUP = 16
SCORE_BYTES = 512 << 20  # scores of one chunk of rows
MAX_GROUPS = 1 << 15  # group maxima of a row that one program can hold


def power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(width: int) -> int:
    """Of a program that holds several rows of that width in registers: at most 16 numbers of a row a thread, where that many warps can be had."""
    return min(16, max(1, width // 512))


def numbers(like: Tensor, *values: float | Tensor) -> Tensor:
    """float32 [n] on the device of `like`; nothing is copied from the host where all of it is 0-dimensional tensors or constant."""
    device = lambda v: v.detach().float() if isinstance(v, Tensor) else torch.full((), float(v), device=like.device)  # noqa: E731
    return torch.stack([device(v) for v in values])


def listed(chosen_N: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the true entries, int32 [N + 1] of which the first `count` are meant, and that count, 0-dimensional: without waiting."""
    n = chosen_N.numel()
    after_N = chosen_N.int().cumsum(0, dtype=torch.int32)
    places_N = torch.where(chosen_N, after_N - 1, n).long()
    out_N = torch.zeros(n + 1, device=chosen_N.device, dtype=torch.int32)
    return out_N.scatter_(0, places_N, torch.arange(n, device=chosen_N.device, dtype=torch.int32)), after_N[-1]
