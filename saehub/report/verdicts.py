"""Measurements in; each SAE's verdict with its rank within the run, and the layer table, out: what terminal, run card and page put on top.

A verdict is a Measurement `verdict` whose `parts` say it in words: `word`, `reasons`, `flags`, `next`, `evidence`. The rank is another
field: the order of `verdict_score` among the SAEs shown together, which says nothing about any of them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from saehub.api import Measurement
from saehub.report import numbers
from saehub.report.table import FIRST, dataset_label, measurement

COLUMNS = ("SAE", "site", "latents", "CE recovered", "FVU", "L0", "dead", "redundancy (null)", "verdict", "rank")
"""Of the layer table; the numbers are those of `in_sample`, or else of the first dataset."""
HEALTHIEST = "healthiest of this run"


@dataclass(frozen=True)
class Verdict:
    """What is said about one SAE."""

    sae: str
    site: str | None
    word: str
    """Such as `deceptively good`: about this SAE alone."""
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    next: tuple[str, ...] = ()
    """What to check."""
    rank: int | None = None
    """1 is the one that puts most of its capacity to use among `of`; None where the score was not measured, or there is nothing to rank."""
    of: int = 0
    evidence: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    @property
    def standing(self) -> str:
        """`1 of 4, healthiest of this run`; empty without a rank."""
        if self.rank is None:
            return ""
        return f"{self.rank} of {self.of}" + (f", {HEALTHIEST}" if self.rank == 1 else "")

    def to_json(self) -> dict[str, Any]:
        """For run_card.json."""
        return asdict(self)


def verdicts(measurements: Iterable[Measurement | Mapping[str, Any]]) -> list[Verdict]:
    """One for each SAE that was judged, in order of appearance; an SAE whose verdict failed is `undecided`, with the reason."""
    rows = [measurement(row) for row in measurements]
    scores = {row.subjects[0]: row.value for row in rows if row.metric == "verdict_score" and row.status == "ok" and len(row.subjects) == 1}
    ranks = rank(scores)
    found = []
    for row in rows:
        if row.metric != "verdict" or len(row.subjects) != 1:
            continue
        parts, sae = row.parts, row.subjects[0]
        listed = {name: tuple(parts.get(name) or ()) for name in ("reasons", "flags", "next", "evidence")}
        if row.status != "ok":
            listed["reasons"] = (row.reason or row.status,)
        found.append(Verdict(sae, row.site, str(parts.get("word") or "undecided"), **listed, rank=ranks.get(sae), of=len(ranks)))
    return found


def alike(said: Iterable[Verdict]) -> list[Verdict]:
    """Verdicts with the same word, reasons, flags and advice as one, `sae` (and `site`) listing those that it is about: a sweep says a thing once."""
    groups: dict[tuple, list[Verdict]] = {}
    for one in said:
        groups.setdefault((one.word, one.reasons, one.flags, one.next), []).append(one)
    listed = lambda names: ", ".join(dict.fromkeys(name for name in names if name)) or None  # noqa: E731
    return [
        ones[0] if len(ones) == 1 else replace(ones[0], sae=listed(one.sae for one in ones) or "", site=listed(one.site for one in ones), rank=None)
        for ones in groups.values()
    ]


def rank(scores: Mapping[str, float]) -> dict[str, int]:
    """1 for the highest score; equal scores share a rank. Empty for fewer than two: one alone is neither first nor last."""
    if len(scores) < 2:
        return {}
    return {name: 1 + sum(other > score for other in scores.values()) for name, score in scores.items()}


def layer_table(measurements: Iterable[Measurement | Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One line an SAE under `COLUMNS`, in the order of the sites' layers: what a sweep over layers is read by. Unknown numbers are `-`."""
    rows = [measurement(row) for row in measurements]
    said = {verdict.sae: verdict for verdict in verdicts(rows)}
    by_sae: dict[str, list[Measurement]] = {}
    for row in rows:
        if len(row.subjects) == 1:
            by_sae.setdefault(row.subjects[0], []).append(row)
    lines = []
    for sae, own in by_sae.items():
        value = _values(own)
        verdict = said.get(sae)
        redundancy, null = value("redundancy"), value("redundancy_null")
        dead = next((value(name) for name in ("dead_share", "dead_share@1e-04") if value(name) is not None), None)
        silent = value("never_fired_share")
        latents = next((row.parts["latents"] for row in own if row.parts.get("latents")), None)
        site = next((row.site for row in own if row.site), None) or "-"
        lines.append((
            sae, site, numbers.count(latents), "no gap" if _unclear(own) else _tenths(value("ce_recovered_zero")), numbers.value(value("fvu")), numbers.value(value("l0")),
            numbers.percent(dead) if dead is not None else numbers.percent(silent) if silent in (0, None) else f"≤ {numbers.percent(silent)}",
            f"{redundancy:.3f} ({null:.3f})" if redundancy is not None and null is not None else numbers.value(redundancy),
            verdict.word if verdict else "-", (verdict.standing if verdict else "") or "-",
        ))  # fmt: skip
    return sorted(lines, key=lambda line: _depth(line[1]))


def _unclear(rows: list[Measurement]) -> bool:
    """Whether the evaluator says of the recovered share in sample that ablation costs too little for one (`clear: false` in its parts)."""
    return any(row.metric == "ce_recovered_zero" and row.parts.get("clear") is False and row.dataset == _first(rows) for row in rows)


def _tenths(share: float | None) -> str:
    """`98.0 %`: digits that stand under each other in a column."""
    return "-" if share is None else f"{100 * share:.1f} %"


def dataset_of(measurements: Iterable[Measurement]) -> str | None:
    """The label of the dataset that the layer table shows."""
    names = list(dict.fromkeys(row.dataset for row in measurements if row.dataset is not None))
    return dataset_label(FIRST[0] if FIRST[0] in names else names[0]) if names else None


def _values(rows: list[Measurement]):
    """metric -> its value in sample (or on the first dataset, or of the weights alone); None where there is none."""
    first = _first(rows)
    found: dict[str, float] = {}
    for row in rows:
        if row.status == "ok" and row.value is not None and row.dataset in (first, None):
            found.setdefault(row.metric, row.value)
    return found.get


def _first(rows: list[Measurement]) -> str | None:
    """In sample, else the first dataset."""
    names = list(dict.fromkeys(row.dataset for row in rows if row.dataset is not None))
    return FIRST[0] if FIRST[0] in names else names[0] if names else None


def _depth(site: str) -> tuple[int, str]:
    """Sort key of a site: its layer, where it has one."""
    layer = next((part for part in site.replace(":", ".").split(".") if part.isdigit()), None)
    return (int(layer) if layer is not None else -1, "" if layer is not None else site)
