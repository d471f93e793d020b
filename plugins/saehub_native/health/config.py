"""The settings of `native/health` in a recipe in; a checked, torch-free dataclass out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saehub_native.evaluate.definitions import Definition


@dataclass(frozen=True)
class HealthConfig:
    """Settings of `native/health`."""

    dead_rate: float = 1e-5
    """r0, as in `native/core`: a silent latent is dead where 3/N over N effective tokens is at most this."""
    duplicate_cosine: float = 0.9
    """Decoder rows of at least this cosine are near-duplicates."""
    dense_rate: float = 0.1
    """A latent that fires on more than this share of rows is dense."""
    curve_points: int = 16
    """Points of the deadness curve, equal in log10 of the rows."""
    pairs: int = 20
    """So many of the closest pairs are listed."""
    memory: int = 2**30
    """Scratch memory in bytes for blocks of cosines and of features; it sets chunk sizes, never results."""

    def __post_init__(self) -> None:
        for name in ("dead_rate", "duplicate_cosine", "dense_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number between 0 and 1")
        if self.curve_points < 2:
            raise ValueError(f"curve_points is {self.curve_points}; at least 2 make a curve")
        if self.pairs < 0:
            raise ValueError(f"pairs is {self.pairs}; give a whole number from 0")
        if self.memory < 2**20:
            raise ValueError(f"memory is {self.memory} bytes; at least 1048576 (1 MiB) is needed")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_native.health.definitions import DEFINITIONS

        return DEFINITIONS
