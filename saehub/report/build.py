"""A run folder in; `report.html` (one page that needs nothing else, not even a network) and `run_card.md` out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from saehub.jsonio import write_text_atomic
from saehub.report import card, definitions, numbers, pictures, table, verdicts
from saehub.report.run_folder import RunFolder
from saehub.report.text import clean

TEMPLATES = Path(__file__).parent / "templates"
VERDICT_STYLE = {"good": "good", **dict.fromkeys(("dead", "duplicated", "collapsed", "collapsed/noisy"), "bad")}
"""Colour of a verdict's word; any other is neither good nor bad."""


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
        "controls": controls(groups),
        "tables": [result_table(group) for group in groups],
        "judgements": judgements(run),
        "styles": VERDICT_STYLE,
        "curves": shown(pictures.curves(run)),
        "legend": pictures.legend(run),
        "comparisons": galleries(
            ("Layer by layer", "Values in sample; each point is one SAE.", pictures.layers(run)),
            ("Sparsity against fidelity", "SAEs of one trainer and width form a curve; only at the same L0 can two of them be compared.", pictures.pareto(run)),
        ),
        "galleries": galleries(
            ("Feature density", "How often latents fire: counts of latents by the share of tokens on which they are not zero.", pictures.densities(run)),
            ("Deadness", "A latent that has not fired yet is dead only if the tokens read suffice to say so.", pictures.silence(run)),
            ("Redundancy", "", pictures.redundancy(run)),
        ),
        "stability": (*pictures.stability_rows(run.measurements), shown(pictures.stability(run))),
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


# ---------------------------------------------------------------- results


def overview(groups: Iterable[table.Group]) -> dict[str, Any]:
    """The headline numbers: {"columns": [(metric, arrow, datasets)], "saes": [(name, site, [[cell of each dataset] of each column])]}."""
    found = [(group, rows) for group, rows in table.headlines(groups) if rows]
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


BESIDE = (("", "the SAE"), ("_pca", "PCA, same k"), ("_random", "random dictionary"), ("_identity", "identity"))
"""End of a metric's name, and whose number it then is."""


def controls(groups: Iterable[table.Group]) -> dict[str, Any]:
    """Each SAE's FVU and CE recovered beside what needs no SAE: {"columns": [(metric, arrow, datasets)], "lines": [(SAE, whose, cells)]}; {} without any."""
    known = [(group, {row.metric: row for row in group.rows if any(cell.value is not None for cell in row.cells.values())}) for group in groups]
    known = [(group, rows) for group, rows in known if sum(f"fvu{end}" in rows for end, _ in BESIDE) > 1]
    columns: dict[str, tuple[table.Row, list[str | None]]] = {}
    for metric in ("fvu", "ce_recovered_zero"):
        for group, rows in known:
            if metric in rows:
                columns.setdefault(metric, (rows[metric], [name for name in group.datasets if name in rows[metric].cells]))
    blank, lines = table.Cell("", ""), []
    for group, rows in known:
        for end, words in BESIDE:
            if f"fvu{end}" in rows:
                own = [rows[f"{metric}{end}"].cells if f"{metric}{end}" in rows else {} for metric in columns]
                cells = [found.get(name, blank) for found, (_, names) in zip(own, columns.values(), strict=True) for name in names]
                lines.append((" + ".join(group.subjects) if not end else "", words, cells))
    heads = [(definitions.title(row), row.arrow, [table.dataset_label(name) for name in names]) for row, names in columns.values()]
    return {"columns": heads, "lines": lines} if lines else {}


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


def judgements(run: RunFolder) -> dict[str, Any]:
    """What stands on top: each SAE's verdict with its reasons, and the layer table where there are several SAEs."""
    said = verdicts.verdicts(run.measurements)
    lines = verdicts.layer_table(run.measurements) if said and len(said) > 1 else []
    return {
        "said": [(one, VERDICT_STYLE.get(one.word, "open")) for one in verdicts.alike(said)],
        "head": verdicts.COLUMNS,
        "lines": lines,
        "dataset": verdicts.dataset_of(run.measurements),
    }


def shown(found: list[pictures.Picture]) -> list[pictures.Picture]:
    """With markup that the template leaves as it is."""
    from markupsafe import Markup

    return [replace(one, svg=Markup(one.svg)) for one in found]


def galleries(*found: tuple[str, str, list[pictures.Picture]]) -> list[tuple[str, str, list[pictures.Picture]]]:
    """(title, words, pictures with their markup) of those that have any picture."""
    return [(title, words, shown(some)) for title, words, some in found if some]


def _saved(run: RunFolder, name: str) -> str:
    folder = run.path / "checkpoints" / name
    return numbers.size(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))
