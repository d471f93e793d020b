"""Measurements in; titles and formulas of their definitions out, as far as the evaluators that made them say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from saehub.api import Measurement
from saehub.report.table import Row


@lru_cache(maxsize=32)
def _of(evaluator: str) -> Mapping[str, Any]:
    """{id: object with `title` and `text`} from `definitions()` of the evaluator's (torch-free) config class; empty where it has none."""
    from saehub.errors import SaehubError
    from saehub.plugins import catalog

    try:
        tell = getattr(catalog().find("evaluator", evaluator).load_config(), "definitions", None)
    except SaehubError:  # not installed here, or broken: the ids still stand in the table
        return {}
    return dict(tell()) if callable(tell) else {}


def title(row: Row) -> str:
    """A few words for the metric; its name where its evaluator has none."""
    entry = _of(row.evaluator).get(row.definition)
    words = getattr(entry, "title", "") or row.metric
    parameter = row.metric.partition("@")[2]
    return f"{words} @ {parameter}" if parameter and words != row.metric else words


def texts(measurements: Iterable[Measurement]) -> list[tuple[str, str, str]]:
    """(id, title, formula) of every definition used, in order; the formula is empty where nobody tells it."""
    found: dict[str, tuple[str, str]] = {}
    for row in measurements:
        if row.definition not in found:
            entry = _of(row.evaluator).get(row.definition)
            found[row.definition] = (getattr(entry, "title", "") or row.metric, getattr(entry, "text", ""))
    return [(name, words, formula) for name, (words, formula) in found.items()]
