"""The settings of `native/verdict` in a recipe in; a checked, torch-free dataclass of thresholds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from saehub.pipeline.movement import UNMOVED

if TYPE_CHECKING:
    from saehub_native.evaluate.definitions import Definition


@dataclass(frozen=True)
class VerdictConfig:
    """Thresholds of the rules (`saehub_native.verdict.rules.RULES`); each is a share, mostly relative to a null measured beside it."""

    reads: ClassVar[Mapping[str, Mapping[str, Any]]] = {"native/core": {}, "native/health": {}}
    """Whose measurements are judged."""
    early_reads: ClassVar[Mapping[str, Mapping[str, Any]]] = {"native/core": {"loss": False}, "native/health": {}}
    """The same for a look during training: no language-model loss, which is the costly part."""

    untrained_moved: float = UNMOVED
    """Share of their norm by which training must have moved the weights; below it, an SAE is its initial state, which may be directions of the
    data and reconstruct rather well."""
    collapsed_fvu: float = 0.9
    """FVU from which nothing is explained: the mean of the rows scores 1."""
    collapsed_recovered: float = 0.1
    """Cross-entropy recovered (zero-ablation) up to which nothing is recovered: zeros score 0."""
    random_share: float = 0.95
    """Share of the FVU of random directions (same k and width) from which an SAE learned nothing that random directions do not give."""
    excellent_recovered: float = 0.9
    """Cross-entropy recovered from which reconstruction looks excellent."""
    excellent_random: float = 0.6
    """Where no loss was measured: share of the random directions' FVU up to which reconstruction looks excellent."""
    adequate_random: float = 0.75
    """The same, up to which it is adequate: what `good` asks for."""
    dead_mostly: float = 0.85
    """Dead share from which a dictionary is dead, whatever it reconstructs."""
    dead_half: float = 0.5
    """Dead share from which it is dead where reconstruction is not excellent."""
    dead_wasted: float = 0.3
    """Dead share from which excellent reconstruction is deceptive."""
    dead_fine: float = 0.15
    """Dead share up to which a dictionary may be good."""
    duplicate_share: float = 0.2
    """Share of latents with a near-duplicate from which a dictionary is duplicated."""
    redundancy_excess: float = 0.5
    """(redundancy - null) / (1 - null) from which it is duplicated."""
    redundancy_fine: float = 0.3
    """The same, up to which it may be good."""
    template_inside: float = 0.5
    """In sample, share of the random directions' FVU up to which an SAE does well enough to have learned a template."""
    template_outside: float = 0.9
    """Out of sample, share of theirs from which such an SAE gives no more than random directions."""
    crater: float = 0.5
    """Fall of an excellent cross-entropy recovered, in sample to out of sample, that says the same."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) <= 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; give a share, above 0 and at most 1")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_native.verdict.definitions import DEFINITIONS

        return DEFINITIONS
