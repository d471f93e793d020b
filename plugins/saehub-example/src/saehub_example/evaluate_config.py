"""The `with:` of a recipe in; checked settings of the evaluator out. No torch here: a plan reads these without loading anything heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DominanceConfig:
    """Settings of `example/dominance`."""

    top: int = 1
    """How many of a row's strongest latents count as dominant."""
