"""A run folder in; `report.html` (one page that needs nothing else, not even a network) and `run_card.md` out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saehub.jsonio import write_text_atomic
from saehub.report import card, definitions, numbers, svg, table
from saehub.report.run_folder import RunFolder
from saehub.report.text import clean

TEMPLATES = Path(__file__).parent / "templates"
CURVES = (
    ("loss", "training loss", {}),
    ("fvu", "FVU of the batch", {"zero": True}),
    ("l0", "L0 of the batch", {"zero": True, "log": False}),
    ("dead", "dead latents", {"y_text": numbers.percent, "zero": True, "log": False}),
    ("lr", "learning rate", {"zero": True, "log": False}),
)
"""(metric of the event stream, title, how it is drawn)."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `run_card.md` into `run_dir` from what is there, and return the page's path.

    Parts that are missing (no events, no results, no card) are said to be missing; nothing is guessed.
    """
    run = RunFolder(Path(run_dir))
    write_text_atomic(run.path / "run_card.md", card.markdown(run))
    page = run.path / "report.html"
    write_text_atomic(page, html(run))
    return page


def html(run: RunFolder) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template("report.html").render(page(run))


def _finalize(value: Any) -> Any:
    """Every word of a run folder is cleaned on its way into the page; markup of our own is not touched."""
    return value if hasattr(value, "__html__") else clean("" if value is None else value)


def page(run: RunFolder) -> dict[str, Any]:
    """What the template is given."""
    from markupsafe import Markup

    groups = table.groups(run.measurements)
    return {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "run": run,
        "title": run.card.get("recipe") or run.name,
        "description": run.card.get("description"),
        "model": (run.card.get("model") or {}).get("name"),
        "when": numbers.moment(run.when),
        "took": numbers.duration(run.card.get("seconds")),
        "errors": [error.get("what") for error in run.card.get("errors") or []],
        "overview": overview(groups),
        "tables": [result_table(group) for group in groups],
        "curves": [Curve(title, Markup(picture)) for title, picture in curves(run)],
        "legend": legend(run),
        "densities": [Curve(title, Markup(picture), text, names) for title, picture, text, names in densities(run)],
        "sections": card.by_section(card.facts(run)),
        "not_measured": card.not_measured(run),
        "limits": card.limits(run),
        "checkpoints": [(name, f"checkpoints/{name}", _saved(run, name)) for name in run.checkpoints()],
        "exports": [
            (form, name, f"exports/{form}/{name}", card.certificate(run, f"{form}/{name}"))
            for form, entries in run.exports().items()
            for name in entries
        ],
        "definitions": definitions.texts(run.measurements),
    }


@dataclass(frozen=True)
class Curve:
    """One picture with its heading."""

    title: str
    svg: Any
    text: str = ""
    names: list[tuple[str, int]] = field(default_factory=list)


# ---------------------------------------------------------------- results


def overview(groups: Iterable[table.Group]) -> dict[str, Any]:
    """The headline numbers: {"columns": [(metric, arrow, datasets)], "saes": [(name, site, [[cell of each dataset] of each column])]}."""
    found = [(group, {row.metric: row for row in table.headlines(group)}) for group in groups]
    found = [(group, rows) for group, rows in found if rows]
    columns: dict[str, tuple[table.Row, list[str | None]]] = {}
    for group, rows in found:
        for name, row in rows.items():
            columns.setdefault(name, (row, [dataset for dataset in group.datasets if dataset in row.cells]))
    blank = table.Cell("", "")
    saes = []
    for group, rows in found:
        cells = [
            [rows[name].cells.get(dataset, blank) if name in rows else blank for dataset in datasets]
            for name, (_, datasets) in columns.items()
        ]
        saes.append((" + ".join(group.subjects), group.site, cells))
    heads = [
        (definitions.title(row), row.arrow, [table.dataset_label(dataset) for dataset in datasets]) for row, datasets in columns.values()
    ]
    return {"columns": heads, "saes": saes}


def result_table(group: table.Group) -> dict[str, Any]:
    """One group as the template prints it: rows of (metric, arrow, cells with footnotes, n, definition)."""
    notes: list[str] = []
    rows = []
    for row in group.rows:
        cells = []
        for name in group.datasets:
            cell = row.cells.get(name)
            cells.append(
                ("", "", "", "") if cell is None else (cell.text, table.footnote(cell.remark, notes).strip(), cell.status, _tooltip(cell))
            )
        rows.append(
            {
                "metric": row.metric,
                "title": definitions.title(row),
                "arrow": row.arrow,
                "cells": cells,
                "n": table.sizes(row),
                "definition": row.definition,
            }
        )
    makers = list(dict.fromkeys(f"{row.evaluator} {row.version}".strip() for row in group.rows))
    heads = [table.dataset_label(name) for name in group.datasets]
    return {"title": group.title, "makers": makers, "heads": heads, "rows": rows, "notes": notes}


def _tooltip(cell: table.Cell) -> str:
    if cell.ci:
        return f"95 % interval {numbers.value(cell.ci[0], cell.stderr)} to {numbers.value(cell.ci[1], cell.stderr)}"
    return cell.reason or ""


# ---------------------------------------------------------------- pictures


def trainings(run: RunFolder) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Stage -> [(rows, metrics)] from the event stream; what a resumed training did again replaces what it had done."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for event in run.events:
        metrics = event.data.get("metrics")
        if event.kind != "progress" or not metrics or not event.stage:
            continue
        at = event.data.get("rows") or event.data.get("done") or 0
        points = found.setdefault(event.stage, [])
        while points and points[-1][0] >= at:
            points.pop()
        points.append((at, metrics))
    return {stage: points for stage, points in found.items() if points}


def curves(run: RunFolder) -> list[tuple[str, str]]:
    """(title, SVG) of every metric that was told during training."""
    found = []
    stages = trainings(run)
    for name, title, looks in CURVES:
        series = [svg.Series(_short(stage), *_column(points, name), i) for i, (stage, points) in enumerate(stages.items())]
        picture = svg.lines([one for one in series if one.x], title=f"{title} during training", x_label="tokens trained on", **looks)
        if picture:
            found.append((title, picture))
    return found


def _column(points: list[tuple[float, dict[str, float]]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(at, metrics[name]) for at, metrics in points if metrics.get(name) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def legend(run: RunFolder) -> list[tuple[str, int]]:
    """(name, colour) of each training, where there are several."""
    names = [_short(stage) for stage in trainings(run)]
    return [(name, i % 6) for i, name in enumerate(names)] if len(names) > 1 else []


def _short(stage: str) -> str:
    return stage.removeprefix("train/")


def densities(run: RunFolder) -> list[tuple[str, str, str, list[tuple[str, int]]]]:
    """(SAE, SVG, what never fired, legend) from measurements that keep a histogram of log10 firing rates in their parts."""
    by_sae: dict[tuple[str, ...], list[tuple[str | None, dict]]] = {}
    for row in run.measurements:
        for part in (row.parts, *(part for part in row.parts.values() if isinstance(part, dict))):
            if isinstance(part.get("log10_edges"), list) and isinstance(part.get("counts"), list):
                by_sae.setdefault(row.subjects, []).append((row.dataset, part))
                break
    found = []
    for subjects, parts in by_sae.items():
        order = sorted(parts, key=lambda item: table.FIRST.index(item[0]) if item[0] in table.FIRST else len(table.FIRST))
        series = [svg.Series(table.dataset_label(name), part["log10_edges"], part["counts"], i) for i, (name, part) in enumerate(order)]
        picture = svg.histogram(series, title=f"firing rates of {' + '.join(subjects)}", x_label="share of tokens on which a latent fires")
        silent = [
            f"{numbers.count(part['never_fired'])} of {numbers.count(part.get('latents'))} never fired ({table.dataset_label(name)})"
            for name, part in order
            if part.get("never_fired") is not None
        ]
        if picture or silent:
            found.append((" + ".join(subjects), picture, "; ".join(silent), [(one.name, one.colour % 6) for one in series]))
    return found


def _saved(run: RunFolder, name: str) -> str:
    folder = run.path / "checkpoints" / name
    return numbers.size(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))
