"""Tables, results, plans and progress in; what a terminal shows out. The only module that imports rich."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from saehub.cli.running import Pace, extent, line, metrics_text, took
from saehub.cli.talk import clean, colour, interactive
from saehub.report import numbers
from saehub.report.pictures import stability_rows
from saehub.report.table import Group, Row, dataset_label, footnote, groups, headlines, measurement, sizes
from saehub.report.verdicts import COLUMNS, Verdict, alike, dataset_of, layer_table, verdicts

STATUS = {
    **dict.fromkeys(("ok", "cached"), "green"),
    **dict.fromkeys(("broken", "failed"), "red"),
    **dict.fromkeys(("resume", "not measured", "undecided", "not verified", "inconclusive", "warning", "missing"), "yellow"),
    **dict.fromkeys(("disabled", "skipped"), "dim"),
}
"""Words that have a colour wherever they fill a cell."""
SHORT = 52
"""Characters of a reason that still stands in a cell; a longer one is a footnote."""
VERDICTS = {"good": "green", "deceptively good": "yellow", "undecided": "yellow", **dict.fromkeys(("dead", "duplicated", "collapsed"), "red")}


def console(*, err: bool = False) -> Console:
    """A console without markup (names from files are not ours) and as wide as its text where nobody looks."""
    stream = sys.stderr if err else sys.stdout
    width = None if interactive(stream) else int(os.environ.get("COLUMNS") or 200)
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width, no_color=not colour(stream))


def show(what: RenderableType) -> None:
    """Print on stdout; without trailing blanks where a program may read it."""
    screen = console()
    if screen.is_terminal:
        return screen.print(what)
    with screen.capture() as held:
        screen.print(what)
    for text in held.get().rstrip("\n").split("\n"):
        print(text.rstrip())


def text(value: object, style: str = "") -> Text:
    """A cell: control characters made visible, known status words coloured."""
    words = clean("" if value is None else value)
    return Text(words, style=style or STATUS.get(words, ""))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: Iterable[str] = ()) -> None:
    """A listing: a bold heading, one line an entry; `right` names the columns of numbers."""
    grid = _grid(columns, right)
    for row in rows:
        grid.add_row(*(item if isinstance(item, Text) else text(item) for item in row))
    if title:
        show(Text(clean(title), style="bold"))
    show(grid)


def _grid(columns: Sequence[str], right: Iterable[str] = ()) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    numeric = set(right)
    for name in columns:
        grid.add_column(Text(clean(name)), justify="right" if name in numeric else "left", overflow="fold")
    return grid


def facts(pairs: Iterable[tuple[str, object]], *, title: str = "") -> None:
    """`name   value` lines, under a bold heading if there is one."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(text(name), text(value))
    if title:
        show(Text(f"\n{clean(title)}", style="bold"))
    show(grid)


# ---------------------------------------------------------------- results


def results(measurements: Iterable[Any]) -> None:
    """One table an SAE: metric, direction, value ± standard error by dataset, n; then the caveats; last, verdicts with reasons, or the headlines; stability."""
    measurements = list(measurements)
    found = groups(measurements)
    if not found:
        return show(Text("no measurements"))
    for i, group in enumerate(found):
        if i:
            show(Text(""))
        _group(group)
    said = verdicts(measurements)
    if said:
        _verdicts(said, measurements)
    elif len(found) > 1:
        _glance(found)
    head, lines = stability_rows([measurement(row) for row in measurements])
    if lines:
        show(Text("\nstability: what SAEs that were trained apart share", style="bold"))
        table(head, lines, right=head[2:5])


def _verdicts(said: Sequence[Verdict], measurements: Sequence[Any]) -> None:
    """The layer table, then why each verdict is what it is, and what to check."""
    show(Text(f"\nverdicts ({dataset_of(measurements) or 'no dataset'})", style="bold"))
    rows = [[_word(cell) if name == "verdict" else text(cell) for name, cell in zip(COLUMNS, line, strict=True)] for line in layer_table(measurements)]
    table(COLUMNS, rows, right=COLUMNS[2:8])
    for verdict in alike(said):
        show(Text.assemble((f"\n{clean(verdict.sae)}: ", "bold"), _word(verdict.word), (f"  {clean(', '.join(verdict.flags))}" if verdict.flags else "", "dim")))
        for reason in verdict.reasons:
            show(Text(f"  {clean(reason)}"))
        if verdict.next:
            show(Text(f"  next: {clean('; '.join(verdict.next))}", style="dim"))


def _word(word: str) -> Text:
    return text(word, VERDICTS.get(word, ""))


def _glance(found: Sequence[Group]) -> None:
    """The headline numbers of several SAEs in one table that fits a narrow terminal: one line an SAE and dataset."""
    picked = headlines(found)
    columns = {name: f"{name} {row.arrow}".strip() for _, rows in picked for name, row in rows.items()}
    grid = _grid(["SAE", "dataset", *columns.values()], right=columns.values())
    short = len({group.subjects for group in found}) == len(found)  # else the site tells them apart
    for group, rows in picked:
        title = " + ".join(group.subjects) if short else group.title
        for dataset in group.datasets:
            cells = [rows[name].cells.get(dataset) if name in rows else None for name in columns]
            if any(cells):
                grid.add_row(text(title), text(_column(dataset)), *(text(cell.text if cell else "") for cell in cells))
                title = ""
    show(Text("\nat a glance", style="bold"))
    show(grid)


def _group(group: Group) -> None:
    makers = list(dict.fromkeys(clean(f"{row.evaluator} {row.version}".strip()) for row in group.rows))
    head = Text.assemble((clean(group.title), "bold"), (f"   {makers[0]}" if len(makers) == 1 else "", "dim"))
    columns = ["metric", "", *(_column(name) for name in group.datasets), "n"] + (["evaluator"] if len(makers) > 1 else [])
    grid = _grid(columns, right=[_column(name) for name in group.datasets])
    notes: list[str] = []
    for row in group.rows:
        cells = [_cell(row, name, notes) for name in group.datasets]
        grid.add_row(
            text(row.metric),
            Text(row.arrow, style="dim"),
            *cells,
            text(sizes(row), "dim"),
            *([text(row.evaluator, "dim")] if len(makers) > 1 else []),
        )
    show(head)
    show(grid)
    _notes(notes)


def _notes(notes: Sequence[str]) -> None:
    for i, note in enumerate(notes, 1):
        show(Text(f"[{i}] {clean(note)}", style="dim"))


def _column(name: str | None) -> str:
    return clean(dataset_label(name))


def _cell(row: Row, dataset: str | None, notes: list[str]) -> Text:
    cell = row.cells.get(dataset)
    if cell is None:
        return Text("")
    found = text(cell.text)
    found.append(footnote(cell.remark, notes), style="dim")
    return found


def comparison(differences: Iterable[Any], names: tuple[str, str]) -> None:
    """The rows of `runs compare`: both values, the difference with its interval, and the verdict; long reasons below."""
    notes: list[str] = []
    grid = _grid(["SAE", "metric", "dataset", *names, "difference (95 %)", "verdict"], right=[*names])
    for item in differences:
        same = item.subjects_a == item.subjects_b
        sae = "+".join(item.subjects_a) if same else f"{'+'.join(item.subjects_a)} → {'+'.join(item.subjects_b)}"
        better = {"a better": "+".join(item.subjects_a), "b better": "+".join(item.subjects_b)} if names == ("first", "second") and not same else {}
        ranks = better or {"a better": names[0], "b better": names[1]}
        verdict = text(f"{ranks[item.verdict]} better" if item.verdict in ranks else item.verdict, "green" if item.verdict in ranks else "")
        if item.reason:
            verdict.append(f": {clean(item.reason)}" if len(item.reason) <= SHORT else footnote(item.reason, notes), style="dim")
        gap = numbers.signed(item.delta, item.stderr).partition(" ± ")[0]
        if item.ci_low is not None and item.verdict not in ("not comparable", "equal"):
            gap += f" [{numbers.value(item.ci_low, item.stderr)}, {numbers.value(item.ci_high, item.stderr)}]{' paired' if item.paired else ''}"
        grid.add_row(
            text(sae), text(item.metric), text(dataset_label(item.dataset)), text(numbers.with_error(item.a, item.stderr_a)),
            text(numbers.with_error(item.b, item.stderr_b)), text(gap), verdict,
        )  # fmt: skip
    show(grid)
    _notes(notes)


# ---------------------------------------------------------------- plan


def plan(made: Any) -> None:
    """The stages of a plan: what each is, its key, whether it is cached, and what the whole will cost."""
    grid = _grid(["stage", "component", "what", "key", "state"])
    for stage in made.stages:
        grid.add_row(text(stage.id), text(stage.component or "-"), text(detail(stage.detail)), text(stage.key[:8], "dim"), state(stage))
    show(grid)
    show(Text(""))
    facts([*totals(made), ("run folder", made.run_dir)])


def state(stage: Any) -> Text:
    """`cached`, `resume`, `run`, or what is missing."""
    if stage.missing and not stage.cached:
        return Text(f"missing {clean(', '.join(stage.missing))}", style="yellow")
    return text("cached" if stage.cached else f"resume at step {numbers.count(stage.detail.get('resume_step'))}" if stage.partial else "run")


def totals(made: Any) -> list[tuple[str, str]]:
    """Model, memory and disk, as far as the plan knows them."""
    cost, lines = made.totals, []
    if made.model:
        shape = f" · {made.shape.n_layers} layers · width {made.shape.d_model}" if made.shape else ""
        lines.append(("model", f"{made.model.name}{shape} · {made.model.dtype} on {made.model.device}"))
    if cost.get("peak_memory"):
        parts = [(name, cost.get(f"{name}_memory")) for name in ("model", "train", "block")]
        shown = " + ".join(f"{numbers.size(n)} {name}" for name, n in parts if n)
        lines.append(("memory", f"about {numbers.size(cost['peak_memory'])} ({shown})"))
    if len(cost.get("passes") or ()) > 1:
        counts = " + ".join(str(len(part)) for part in cost["passes"])
        lines.append(("passes", f"{len(cost['passes'])} ({counts} trainings): about {numbers.size(cost['train_budget'])} is free for training"))
    if cost.get("activation_bytes"):
        kept = {"spool": "on disk while the run lasts", "disk": "kept on disk", "none": "not stored"}.get(
            cost.get("store"), str(cost.get("store"))
        )
        lines.append(
            ("activations", f"{numbers.size(cost['bytes_per_token'])} a token · {numbers.size(cost['activation_bytes'])} in all, {kept}")
        )
    if cost.get("disk_free") is not None:
        lines.append(("disk", f"{numbers.size(cost['disk_free'])} free"))
    cached = sum(stage.cached for stage in made.stages)
    lines.append(("stages", f"{len(made.stages)}, of which {cached} cached"))
    return lines


DETAILS = {
    "resume_step": lambda value: "",  # stands under state
    "rows": lambda n: f"{numbers.count(n)} rows",
    "tokens": lambda n: f"{numbers.count(n)} tokens",
    "steps": lambda n: f"{numbers.count(n)} steps",
    "batch": lambda n: f"batch {numbers.count(n)}",
    "d_in": lambda n: f"width {n}",
    "d_sae": lambda n: f"{numbers.count(n)} latents",
    "bytes": lambda n: f"disk {numbers.size(n)}",
    "memory": lambda n: f"memory {numbers.size(n)}",
    "seconds": lambda n: f"about {numbers.duration(n)}",
    "source": str,
    "site": str,
    "target_site": lambda name: f"→ {name}",
    "share": lambda shares: "" if len(shares) < 2 else f"shares {', '.join(f'{share:g}' for share in shares)}",
    "datasets": lambda names: "on " + ", ".join(names),
}
"""How the numbers of a stage's `detail` are said; any other is `name value`."""


def detail(data: Mapping[str, Any]) -> str:
    """`1,000,000 rows · 488 steps · 1,024 latents · memory 80.0 MB`."""
    words = []
    for name, value in data.items():
        if value is None or value == "" or isinstance(value, bool) and not value:
            continue
        if name in DETAILS:
            words.append(DETAILS[name](value))
        elif isinstance(value, (list, tuple)):
            words.append(f"{name.replace('_', ' ')} {', '.join(map(str, value))}")
        elif isinstance(value, Mapping):
            words.append(detail(value))
        else:
            words.append(name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {value}")
    return " · ".join(filter(None, words))


# ---------------------------------------------------------------- progress


class _Metrics(ProgressColumn):
    """Loss, FVU, L0 and dead share of a training, or the text of another stage."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("told", ""), style="cyan")


class _Pace(ProgressColumn):
    """Tokens a second and the time to go, as the pipeline measured them."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("pace", ""), style="dim")


class Bars:
    """Reads the event stream and keeps one bar for every stage at work; finished stages become lines above them."""

    def __init__(self, screen: Console | None = None):
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            _Metrics(),
            _Pace(),
            console=screen or console(err=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._tasks: dict[str | None, Any] = {}
        self._began: dict[str | None, float] = {}
        self._pace = Pace()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Any) -> None:
        """Draw one event."""
        stage, data = event.stage, event.data
        if event.kind in ("stage_started", "progress") and stage not in self._tasks:
            self._began[stage] = event.t
            self._tasks[stage] = self._bars.add_task(clean(stage or "run"), total=None, told="", pace="")
        if event.kind == "progress":
            told = metrics_text(data.get("metrics") or {}) or clean(data.get("text") or "")
            done, total, _ = extent(data)
            self._bars.update(self._tasks[stage], completed=done or 0, total=total, told=told, pace=self._pace.text(event))
        elif event.kind != "stage_started":
            ended = event.kind in ("stage_finished", "stage_failed")
            if ended and stage in self._tasks:
                self._bars.remove_task(self._tasks.pop(stage))
            words = line(event, took(event, event.t - self._began[stage] if stage in self._began else None) if ended else "")
            if words:
                mark = {"stage_finished": ("✓ ", "green"), "stage_cached": ("✓ ", "green"), "stage_failed": ("✗ ", "red")}.get(
                    event.kind, ("  ", "")
                )
                self._bars.console.print(Text.assemble(mark, Text.from_ansi(words)))
