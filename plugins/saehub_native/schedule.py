"""A step number in, the factor on the learning rate out: linear warm-up, constant, linear decay to zero."""

from __future__ import annotations


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor for the 0-based `step` of `steps`; `warmup` and `decay` are fractions of `steps`.

    f(s) = min(1, (s + 1) / (W + 1), (S − s) / (D + 1)) with W = round(warmup S) and D = round(decay S): never zero, 1 in between.
    """
    rising = (step + 1) / (round(warmup * steps) + 1)
    falling = (steps - step) / (round(decay * steps) + 1)
    return max(0.0, min(1.0, rising, falling))
