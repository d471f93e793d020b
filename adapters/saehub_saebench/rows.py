"""What one SAE scored under each seed in; measurements with mean, standard error and n, or the reason why there are none, out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from saehub.api import EvalContext, Measurement, Subject
from saehub_saebench.definitions import of_metric

OUTPUT = "saebench_json"
"""Key in `Measurement.parts` under which SAEBench's own result, of the first seed, is kept: what `--saebench-json` writes."""


@dataclass
class Scores:
    """What one SAE scored on one dataset under one seed."""

    values: dict[str, float | None]
    """Metric -> value; None or NaN where SAEBench has no number."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Metric -> why it has no number."""
    output: dict[str, Any] | None = None
    """SAEBench's own result, as it would write it."""
    note: str | None = None
    """A caveat for all of them."""


def mean_over(names: Sequence[str]) -> str:
    """The caveat of a number that is no single dataset's."""
    return f"mean over {len(names)} datasets" if len(names) != 1 else f"of the one dataset {names[0]}"


@dataclass(frozen=True)
class Place:
    """What the rows of one SAE have in common."""

    evaluator: str
    """Such as `core`: the component's name."""
    subject: Subject
    context: EvalContext
    seeds: tuple[int, ...]
    dataset: str | None = None
    dataset_hash: str | None = None
    note: str | None = None
    """A caveat for every row."""

    def row(self, metric: str, value: float | None, **more: Any) -> Measurement:
        """One row."""
        known = of_metric(self.evaluator, metric)
        notes = "; ".join(text for text in (more.pop("note", None), known.caveat, self.note) if text)
        return Measurement(
            metric=metric,
            value=value,
            subjects=(self.subject.id,),
            subject_hashes=(self.subject.hash,),
            evaluator=f"saebench/{self.evaluator}",
            definition=known.id,
            site=self.subject.site,
            dataset=self.dataset,
            dataset_hash=self.dataset_hash,
            better=known.better,
            version=library_version(),
            seed=self.context.seed,
            note=notes or None,
            **more,
        )

    def missing(self, metrics: Sequence[str], reason: str, status: str = "not_measured") -> list[Measurement]:
        """Rows that say why there is no number."""
        return [self.row(metric, None, status=status, reason=reason) for metric in metrics]


def measurements(place: Place, scores: Mapping[int, Scores]) -> list[Measurement]:
    """A row a metric: the mean over seeds, its standard error s/√n, and a 95 % interval of Student's t with n - 1 degrees of freedom."""
    metrics = list(dict.fromkeys(metric for found in scores.values() for metric in found.values))
    told = next((found.note for found in scores.values() if found.note), None)
    if told:
        place = replace(place, note="; ".join(filter(None, (told, place.note))))
    first = next((found.output for found in scores.values() if found.output is not None), None)
    rows = []
    for metric in metrics:
        values = [found.values.get(metric) for found in scores.values()]
        good = [value for value in values if value is not None and math.isfinite(value)]
        if len(good) < len(values):
            told = next((found.reasons[metric] for found in scores.values() if metric in found.reasons), None)
            lost = len(values) - len(good)
            reason = told or f"SAEBench has no finite number for it under {lost} of {len(values)} seeds"
            rows.append(place.row(metric, None, status="not_measured", reason=reason, unit_of_n="seeds"))
            continue
        rows.append(_mean(place, metric, good))
    if rows and first is not None:
        rows[0] = _with_part(rows[0], first)
    return rows


def _mean(place: Place, metric: str, values: list[float]) -> Measurement:
    n = len(values)
    parts = {"seeds": list(place.seeds), "values": values}
    mean = float(np.mean(values))
    if n < 2:
        return place.row(metric, mean, n=n, unit_of_n="seeds", parts=parts, note="one seed: no standard error")
    from scipy.stats import t

    stderr = float(np.std(values, ddof=1) / math.sqrt(n))
    wide = float(t.ppf(0.975, n - 1)) * stderr
    same = "the same under every seed" if stderr == 0 else None
    return place.row(
        metric, mean, stderr=stderr, ci_low=mean - wide, ci_high=mean + wide, n=n, unit_of_n="seeds", parts=parts, note=same
    )


def _with_part(row: Measurement, output: dict[str, Any]) -> Measurement:
    return replace(row, parts={**row.parts, OUTPUT: output})


@lru_cache(maxsize=1)
def library_version() -> str:
    """Version of sae-bench; empty where it is not installed."""
    try:
        return version("sae-bench")
    except PackageNotFoundError:
        return ""

