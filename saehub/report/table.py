"""Measurements in; one table an SAE out, with in-sample and out-of-sample side by side: what the terminal and the page both print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from saehub.api import Measurement
from saehub.report import numbers

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
FIRST = ("in_sample", "out_of_sample")
"""Datasets that come first, in this order; any other follows in order of appearance, and `no dataset` is last."""
HEADLINES = (("fvu",), ("ce_recovered_zero",), ("l0",), ("dead_share", "dead_share@1e-04", "never_fired_share"))
"""What one wants to know first, in this order; of each, the first metric that has a value."""


@dataclass(frozen=True)
class Cell:
    """One number on one dataset."""

    text: str
    """`0.1290 ± 0.0021`, `failed`, `not measured`, or `undecided` where the evaluator looked and could not tell."""
    status: str
    """`ok`, `failed` or `not_measured`."""
    value: float | None = None
    stderr: float | None = None
    ci: tuple[float, float] | None = None
    """95 % interval, where the evaluator gives one."""
    n: int | None = None
    unit: str = ""
    reason: str | None = None
    """Why there is no number."""
    note: str | None = None
    """A caveat that goes with the number."""

    @property
    def remark(self) -> str | None:
        """What has to be said with it: the caveat of a number, the reason of a missing one."""
        return self.note if self.status == "ok" else self.reason or self.note


@dataclass(frozen=True)
class Row:
    """One metric of one SAE (or group of SAEs), over all datasets."""

    subjects: tuple[str, ...]
    site: str | None
    metric: str
    better: str
    evaluator: str
    version: str
    definition: str
    cells: Mapping[str | None, Cell] = field(default_factory=dict)
    """dataset name -> cell."""

    @property
    def arrow(self) -> str:
        """`↑` where higher is better, `↓` where lower is, else empty."""
        return ARROWS.get(self.better, "")


@dataclass(frozen=True)
class Group:
    """All rows of one SAE."""

    subjects: tuple[str, ...]
    site: str | None
    datasets: tuple[str | None, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """`native-k32 · resid_post.2`."""
        return " · ".join([" + ".join(self.subjects) or "no SAE", *([self.site] if self.site else [])])


def measurement(data: Mapping[str, Any] | Measurement) -> Measurement:
    """A row of `results.json` as a Measurement; unknown keys (a newer saehub's) are left out."""
    if isinstance(data, Measurement):
        return data
    known = {name: data[name] for name in Measurement.__dataclass_fields__ if name in data}
    for name in ("subjects", "subject_hashes"):
        known[name] = tuple(known.get(name) or ())
    return Measurement(**{"metric": "?", "value": None, "evaluator": "?", "definition": "?", **known})


def cell(row: Measurement) -> Cell:
    """What is printed for one measurement."""
    interval = (row.ci_low, row.ci_high) if row.ci_low is not None and row.ci_high is not None else None
    if row.status == "ok" and row.parts.get("word"):  # a class, coded as a number, which says itself in words
        text = str(row.parts["word"])
    elif row.status == "ok" and row.value is not None:
        text = numbers.with_error(row.value, row.stderr)
        if row.stderr is None and interval:
            text = f"{numbers.value(row.value)} [{numbers.value(interval[0])}, {numbers.value(interval[1])}]"
    else:
        text = "failed" if row.status == "failed" else "undecided" if (row.reason or "").startswith("undecided") else "not measured"
    return Cell(text, row.status, row.value, row.stderr, interval, row.n, row.unit_of_n, row.reason, row.note)


def rows(measurements: Iterable[Measurement | Mapping[str, Any]]) -> list[Row]:
    """One row a (SAE, evaluator, metric, definition), in order of appearance, with a cell for each dataset."""
    found: dict[tuple, Row] = {}
    for item in map(measurement, measurements):
        key = (item.subjects, item.site, item.evaluator, item.metric, item.definition)
        if key not in found:
            found[key] = Row(item.subjects, item.site, item.metric, item.better, item.evaluator, item.version, item.definition, {})
        found[key].cells[item.dataset] = cell(item)  # type: ignore[index]
    return list(found.values())


def datasets(table: Iterable[Row]) -> tuple[str | None, ...]:
    """The columns: in_sample, out_of_sample, others by appearance, then None (measured on no dataset)."""
    seen = list(dict.fromkeys(name for row in table for name in row.cells))
    named = [name for name in FIRST if name in seen] + [name for name in seen if name is not None and name not in FIRST]
    return tuple(named) + ((None,) if None in seen else ())


def groups(measurements: Iterable[Measurement | Mapping[str, Any]]) -> list[Group]:
    """The rows by SAE; every group has the same columns, so that they can be read below each other."""
    table = rows(measurements)
    columns = datasets(table)
    by_sae: dict[tuple, list[Row]] = {}
    for row in table:
        by_sae.setdefault((row.subjects, row.site), []).append(row)
    return [Group(subjects, site, columns, tuple(members)) for (subjects, site), members in by_sae.items()]


def headlines(found: Iterable[Group]) -> list[tuple[Group, dict[str, Row]]]:
    """Each group with one row, by metric, for each of `HEADLINES` as far as it was measured: the same metric for all of them, if one is known of all."""
    valued = [(group, {row.metric: row for row in group.rows if any(cell.value is not None for cell in row.cells.values())}) for group in found]
    picked: list[tuple[Group, dict[str, Row]]] = [(group, {}) for group, _ in valued]
    for names in HEADLINES:
        some = [rows for _, rows in valued if any(name in rows for name in names)]
        common = next((name for name in names if some and all(name in rows for rows in some)), None)
        for (_, rows), (_, into) in zip(valued, picked, strict=True):
            name = common if common in rows else next((name for name in names if name in rows), None)
            if name is not None:
                into[name] = rows[name]
    return picked


def sizes(row: Row) -> str:
    """`256 sequences`, or `256 | 200 sequences` where the datasets differ."""
    counted = [cell for cell in row.cells.values() if cell.n is not None]
    if not counted:
        return ""
    return f"{' | '.join(dict.fromkeys(numbers.count(cell.n) for cell in counted))} {counted[0].unit}".strip()


def footnote(remark: str | None, notes: list[str]) -> str:
    """` [2]`, where `remark` is the second of `notes` (it is added if it is new); empty without a remark."""
    if not remark:
        return ""
    if remark not in notes:
        notes.append(remark)
    return f" [{notes.index(remark) + 1}]"


def dataset_label(name: str | None) -> str:
    """`in-sample` for `in_sample`; `overall` for a number that is about no single dataset: of the weights alone, a verdict, a mean over datasets."""
    return "overall" if name is None else name.replace("_", "-") if name in FIRST else name
