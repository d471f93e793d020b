"""The settings of `native/stability` in a recipe in; a checked, torch-free dataclass out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saehub_native.evaluate.definitions import Definition


@dataclass(frozen=True)
class StabilityConfig:
    """Settings of `native/stability`; by default every pair of SAEs at one site is matched exactly, as far as the time budget lets it."""

    threshold: float = 0.7
    """Cosine that a shared latent must exceed with its partner, in the encoder and in the decoder (EleutherAI's 0.7)."""
    bins: int = 5
    """Groups of equally many latents, from rare to frequent, for which the matching is shown separately."""
    nulls: bool = True
    """Match two random dictionaries, and the same SAEs before their first step, beside: what a number means without training."""
    candidates: int = 32
    """Pairs kept for each latent when a matching begins; it changes time and memory, not the result."""
    seconds: float = 600.0
    """Time budget of one matching. When it is used up, the best so far is given, with its certified gap."""
    gap: float = 0.0
    """Relative gap at which a matching is good enough: 0 is exact, 1e-3 is quicker beyond 30,000 latents."""
    memory: int = 2 * 2**30
    """Bytes that cosines and features may take at a time; it changes time, never results."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; a cosine between 0 and 1 is needed, such as 0.7")
        for name, least in (("bins", 1), ("candidates", 1), ("memory", 2**20)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; at least {least} is needed")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; a time budget is above 0")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap is {self.gap}; give a share such as 1e-3, or 0 for exact")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_native.evaluate.stability.definitions import DEFINITIONS

        return DEFINITIONS
