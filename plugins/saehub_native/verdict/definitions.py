"""A definition's id in, its meaning in words out: what `native/verdict` says. Torch-free, for reports."""

from __future__ import annotations

from saehub_native.evaluate.definitions import Definition, _define
from saehub_native.health.definitions import DEFINITIONS as HEALTH

WORDS = ("collapsed", "dead", "duplicated", "deceptively good", "undecided", "good")
"""The verdicts; a Measurement's value is the position in this tuple."""

_OWN = (
    _define(
        "verdict",
        "verdict",
        f"One word about one SAE on its own: {', '.join(f'{code} {word}' for code, word in enumerate(WORDS))}. Rules are applied in order, each on "
        "measurements beside their nulls and budgets; `good` needs everything measured that could speak against it, else the word is undecided. "
        "The parts hold the reasons, the evidence, flags and what to check next. Verdicts are not a scale: nothing is averaged.",
    ),
    _define(
        "verdict_score",
        "capacity put to use",
        "recovered⁺ · (1 - dead) · (1 - excess⁺): cross-entropy recovered (zero-ablation; 1 - FVU where no loss was measured, or its gap is not clear of 0), times the share of "
        "latents that is not dead, times 1 minus the redundancy above its null, (redundancy - null) / (1 - null); in sample. Its error is to first order. It orders the SAEs of "
        "one sweep, and is not a verdict: the best of a bad sweep ranks first in it.",
        "higher",
    ),
)
DEFINITIONS: dict[str, Definition] = {entry.id: entry for entry in (*_OWN, HEALTH["saehub.out_minus_in/1"])}
"""Definition id -> Definition."""
