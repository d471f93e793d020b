"""A run folder in; its pictures (training curves, densities, deadness, redundancy, trade-offs, layers, stability) as inline SVG out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from saehub.api import Measurement
from saehub.report import numbers, svg, sweep, table
from saehub.report.run_folder import RunFolder

CURVES = (
    ("loss", "training loss", {}),
    ("fvu", "FVU of the batch", {"zero": True}),
    ("l0", "L0 of the batch", {"zero": True, "log": False}),
    ("dead", "dead latents", {"y_text": numbers.percent, "zero": True, "log": False}),
    ("lr", "learning rate", {"zero": True, "log": False}),
)
"""(metric of the event stream, title, how it is drawn)."""


@dataclass(frozen=True)
class Picture:
    """One picture with its heading."""

    title: str
    svg: Any
    text: str = ""
    names: list[tuple[str, int]] = field(default_factory=list)
    """Legend: (name, colour)."""
    head: list[str] = field(default_factory=list)
    """Of a small table below it."""
    rows: list[list[str]] = field(default_factory=list)


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


def curves(run: RunFolder) -> list[Picture]:
    """Every metric that was told during training."""
    found = []
    stages = trainings(run)
    for name, title, looks in CURVES:
        series = [svg.Series(_short(stage), *_column(points, name), i) for i, (stage, points) in enumerate(stages.items())]
        picture = svg.lines([one for one in series if one.x], title=f"{title} during training", x_label="tokens trained on", **looks)
        if picture:
            found.append(Picture(title, picture))
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


def densities(run: RunFolder) -> list[Picture]:
    """One for each SAE with a measurement that keeps a histogram of log10 firing rates in its parts."""
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
            found.append(Picture(" + ".join(subjects), picture, "; ".join(silent), _names(series)))
    return found


def _names(series: list[svg.Series]) -> list[tuple[str, int]]:
    return [(one.name, one.colour % 6) for one in series]


def silence(run: RunFolder) -> list[Picture]:
    """Share of latents that have not fired yet, against the tokens read, in evaluation: for each dataset, from parts with a `curve` of `silent`."""
    by_dataset: dict[str | None, list[svg.Series]] = {}
    for row in run.measurements:
        curve = row.parts.get("curve")
        if isinstance(curve, dict) and isinstance(curve.get("rows"), list) and isinstance(curve.get("silent"), list):
            series = by_dataset.setdefault(row.dataset, [])
            series.append(svg.Series(" + ".join(row.subjects), curve["rows"], curve["silent"], len(series)))
    found = []
    for name, series in by_dataset.items():
        title = f"latents that have not fired yet ({table.dataset_label(name)})"
        picture = svg.lines(series, title=title, x_label="tokens read (logarithmic)", y_text=numbers.percent, zero=True, log=False, log_x=True)
        if picture:
            found.append(Picture(title, picture, "", _names(series)))
    return found


def redundancy(run: RunFolder) -> list[Picture]:
    """Redundancy of each SAE beside that of random directions of the same number and dimension."""
    known = sweep.values(run.measurements, None)
    names = [name for name, own in known.items() if "redundancy" in own]
    if not any("redundancy_null" in known[name] for name in names):
        return []
    series = [
        svg.Series("SAE", list(range(1, len(names) + 1)), [known[name]["redundancy"] for name in names], 0, names, joined=False),
        svg.Series("random directions", list(range(1, len(names) + 1)), [known[name].get("redundancy_null", float("nan")) for name in names], 5, names, joined=False),
    ]  # fmt: skip
    picture = svg.points(
        series, title="redundancy and its null", x_label="SAE", x_marks=range(1, len(names) + 1), x_text=lambda x: numbers.short(x), low=0.0
    )
    rows = [[str(i), name, f"{known[name]['redundancy']:.3f}", _three(known[name].get("redundancy_null"))] for i, name in enumerate(names, 1)]
    words = "Mean over latents of the greatest cosine with another decoder row. Only what lies above random directions says anything."
    return [Picture("redundancy", picture, words, _names(series), ["", "SAE", "redundancy", "random"], rows)]


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def pareto(run: RunFolder) -> list[Picture]:
    """L0 against FVU and CE recovered, at each site with several SAEs, and the curves read at matched L0."""
    found = []
    for one in sweep.tradeoffs(run.measurements, run.card.get("saes") or {}):
        series = [
            svg.Series(curve.name, [x for x, _, _ in curve.points], [y for _, y, _ in curve.points], i, [name for _, _, name in curve.points])
            for i, curve in enumerate(one.curves)
        ]
        title = f"{one.title} against L0 at {one.site}"
        picture = svg.points(series, title=title, x_label="L0 (active latents a row)")
        matched = one.matched
        rows = []
        for curve in one.curves if matched else ():
            readings = [curve.at(l0) for l0 in matched]
            rows.append([curve.name, *("" if got is None else f"{got[0]:.4f}" + ("" if got[1] else " *") for got in readings)])
        words = f"{table.dataset_label(one.dataset)}. Not beaten at any L0 as low: {', '.join(one.front())}."
        if rows:
            words += " At matched L0 (* between two measured points, linear in log L0):"
        elif len(one.curves) > 1:
            words += " The curves share no L0, so they cannot be compared at a matched one."
        found.append(Picture(title, picture, words, _names(series), ["", *(f"L0 {l0:.4g}" for l0 in matched)] if rows else [], rows))
    return found


def layers(run: RunFolder) -> list[Picture]:
    """Each of the layer metrics against the layer, where SAEs sit in several."""
    found = []
    for _, title, points in sweep.layers(run.measurements):
        series = [svg.Series(title, [x for x, _, _ in points], [y for _, y, _ in points], 0, [name for _, _, name in points])]
        marks = sorted({x for x, _, _ in points})
        picture = svg.points(series, title=f"{title} by layer", x_label="layer", x_marks=marks, x_text=lambda x: f"{x:g}", low=0.0)
        found.append(Picture(title, picture))
    return found


def stability(run: RunFolder) -> list[Picture]:
    """Curves over a threshold that measurements of several SAEs keep in their parts (`curve`: x, y, x_label, title)."""
    found: dict[tuple[str, str], list[svg.Series]] = {}
    for row in run.measurements:
        curve = row.parts.get("curve")
        if len(row.subjects) > 1 and isinstance(curve, dict) and isinstance(curve.get("x"), list) and isinstance(curve.get("y"), list):
            series = found.setdefault((str(curve.get("title") or row.metric), str(curve.get("x_label") or "")), [])
            series.append(svg.Series(" + ".join(row.subjects), curve["x"], curve["y"], len(series)))
    pictures = []
    for (title, label), series in found.items():
        picture = svg.lines(series, title=title, x_label=label, y_text=numbers.percent, zero=True, log=False)
        if picture:
            pictures.append(Picture(title, picture, "", _names(series)))
    return pictures


def stability_rows(measurements: list[Measurement]) -> tuple[list[str], list[list[str]]]:
    """(head, lines): for each pair of SAEs what they share, beside the nulls; empty where no pair was compared."""
    columns = (("shared_share", "shared"), ("pw_mcc", "PW-MCC"), ("pw_mcc_abs", "PW-MCC, absolute"))
    by_pair: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for row in measurements:
        if len(row.subjects) == 2 and row.metric.partition("@")[0].removesuffix("_random").removesuffix("_init") in dict(columns):
            by_pair.setdefault(row.subjects, {})[row.metric] = row
    lines = []
    for pair, own in by_pair.items():
        for metric, words in columns:
            if metric in own:
                null = [table.cell(own[name]).text if (name := f"{metric}{end}") in own else "not measured" for end in ("_random", "_init")]
                lines.append([" + ".join(pair), words, table.cell(own[metric]).text, *null, own[metric].note or ""])
    return (["SAEs", "", "these SAEs", "random", "before training", "matching"], lines) if lines else ([], [])
