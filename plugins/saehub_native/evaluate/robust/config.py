"""The settings of `native/paraphrase` and `native/drift` in a recipe in; checked, torch-free dataclasses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saehub_native.evaluate.definitions import Definition

PERTURBATIONS = ("case", "spacing", "punctuation", "typos", "contractions", "synonyms")


@dataclass(frozen=True)
class ParaphraseConfig:
    """Settings of `native/paraphrase`."""

    texts: int = 64
    """Sequences of each dataset that are put differently (and lines of `pairs` that are read)."""
    perturbations: tuple[str, ...] = PERTURBATIONS
    """Built-in ways to put a text differently: case, spacing, punctuation, typos, contractions, synonyms."""
    pairs: str | None = None
    """A .jsonl file of your own pairs: one object a line, with `text` and `paraphrase`."""

    def __post_init__(self) -> None:
        if self.texts < 2:
            raise ValueError(f"texts is {self.texts}; at least 2 are needed, for an error")
        unknown = [name for name in self.perturbations if name not in PERTURBATIONS]
        if unknown:
            raise ValueError(f"perturbations: {unknown[0]!r} is not known; choose among {', '.join(PERTURBATIONS)}")
        if not self.perturbations and self.pairs is None:
            raise ValueError("perturbations is empty and pairs is not given; nothing would be measured")

    def files(self) -> tuple[str, ...]:
        """Files whose contents decide the result."""
        return (self.pairs,) if self.pairs else ()

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_native.evaluate.robust.definitions import DEFINITIONS

        return DEFINITIONS


@dataclass(frozen=True)
class DriftConfig:
    """Settings of `native/drift`."""

    model: str | None = None
    """Another model to read the same site of: a later checkpoint, a chat version; a Hugging Face id or a folder. None: other text only."""
    revision: str | None = None
    """Hub revision of that model."""
    sequences: int = 128
    """Sequences of each dataset that are read."""

    def __post_init__(self) -> None:
        if self.sequences < 4:
            raise ValueError(f"sequences is {self.sequences}; at least 4 are needed: two halves with two each")
        if self.revision and not self.model:
            raise ValueError("revision is given without a model")

    def files(self) -> tuple[str, ...]:
        """Files whose contents decide the result."""
        from pathlib import Path

        return (self.model,) if self.model and Path(self.model).exists() else ()

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_native.evaluate.robust.definitions import DEFINITIONS

        return DEFINITIONS
