"""A plan in; its run, watched on stderr (or as JSON lines on stdout), its results table on stdout and an exit code out."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from saehub.cli.talk import SCHEMA, State, clean, interactive, out_json_line, say, style
from saehub.errors import Interrupted, SaehubError
from saehub.report import numbers

if TYPE_CHECKING:
    from saehub.pipeline.plan import Plan
    from saehub.pipeline.run import RunResult


def run_plan(plan: Plan, *, recipe_text: str | None = None, as_json: bool = False, quiet: bool = False, log: Iterable[str] = ()) -> int:
    """Run and print (`quiet`: without results and farewell); errors of stages are raised by the pipeline and told by `failure`.

    `log` names loggers (`tensorboard`, `wandb`) that read the events too.
    """
    from saehub.report.loggers import loggers

    readers = loggers(log)
    try:
        return _run_plan(plan, readers, recipe_text, as_json, quiet)
    finally:
        for reader in readers:
            reader.close()


def _run_plan(plan: Plan, readers: list[Any], recipe_text: str | None, as_json: bool, quiet: bool) -> int:
    from saehub.cli.failure import OK
    from saehub.jsonio import read_json
    from saehub.pipeline.evaluate import measurement
    from saehub.pipeline.run import run

    state = click.get_current_context().ensure_object(State)
    if as_json:
        state.lines = True
        result = run(plan, (json_line, *readers), recipe_text=recipe_text, command=state.command)
        if not quiet:
            out_json_line(summary(result))
        return OK
    from saehub.cli import render

    say(f"run folder: {plan.run_dir}")
    try:
        with watcher() as watch:
            result = run(plan, (watch, *readers), recipe_text=recipe_text, command=state.command)
    except Interrupted:
        raise
    except SaehubError:
        finished = plan.run_dir / "report.html"
        if finished.is_file():
            measured = [measurement(row) for row in read_json(plan.run_dir / "results.json")["measurements"]]
            if measured and not quiet:
                say()
                render.results(measured)
            say(f"what is finished is kept and reported: {finished}\n")
        raise
    if not quiet:
        say()
        render.results(result.measurements)
        farewell(result)
    return OK


def watcher() -> AbstractContextManager[Any]:
    """The reader of the event stream that suits stderr: bars on a terminal, a line now and then elsewhere."""
    if not interactive():
        return Lines(say)
    from saehub.cli.render import Bars

    return Bars()


def summary(result: RunResult) -> dict:
    """The last line of `run --json`."""
    return {
        "schema": SCHEMA,
        "kind": "summary",
        "status": "finished",
        "run_dir": str(result.run_dir),
        "report": str(result.run_dir / "report.html"),
        "seconds": result.seconds,
        "checkpoints": {name: str(path) for name, path in result.checkpoints.items()},
        "measurements": result.results,
    }


def farewell(result: RunResult) -> None:
    """Where things are, and what one may do next."""
    say(f"\ndone in {numbers.duration(result.seconds)}")
    say(f"report:  {result.run_dir / 'report.html'}")
    for path in result.checkpoints.values():
        say(f"SAE:     saehub.load({str(path)!r})")
    from saehub.pipeline.workspace import home

    here = result.run_dir.absolute()
    say(f"look:    saehub runs show {clean(shlex.quote(here.name if here.parent == (home() / 'runs').absolute() else str(here)))}")


def json_line(event: Any) -> None:
    """One event, one line of stdout."""
    out_json_line({"kind": event.kind, "stage": event.stage, "t": event.t, "data": event.data})


def metrics_text(metrics: dict[str, float]) -> str:
    """`loss 0.412 · FVU 0.1312 · L0 32.0 · dead 0.4 %`, in this order, then whatever else the trainer tells."""
    words = []
    for name, label in (("loss", "loss"), ("fvu", "FVU"), ("l0", "L0"), ("dead", "dead")):
        if metrics.get(name) is not None:
            number = metrics[name]
            words.append(f"{label} {numbers.percent(number) if name == 'dead' else f'{number:.1f}' if name == 'l0' else f'{number:.4g}'}")
    return " · ".join(words)


class Pace:
    """Progress events in; how fast each stage is and how long it still takes, out: on average since this process began it.

    Work comes in blocks (a long forward pass, then many quick steps), so that a shorter window would swing between the two.
    """

    def __init__(self) -> None:
        self._first: dict[str | None, tuple[float, float, float]] = {}

    def text(self, event: Any) -> str:
        """`12.3k tokens/s · 1 min 02 s to go`; empty until two events were seen."""
        done, total, unit = extent(event.data)
        if done is None:
            return ""
        t1, done1, rows1 = event.t, done, event.data.get("rows") or 0
        t0, done0, rows0 = self._first.setdefault(event.stage, (t1, done1, rows1))
        if t1 <= t0 or done1 <= done0:
            return ""
        words = []
        if rows1 > rows0:
            words.append(f"{numbers.short((rows1 - rows0) / (t1 - t0))} tokens/s")
        elif unit not in ("%", ""):
            words.append(f"{numbers.short((done1 - done0) / (t1 - t0))} {unit}/s")
        if total and done1 < total:
            words.append(f"{numbers.duration((total - done1) * (t1 - t0) / (done1 - done0))} to go")
        return " · ".join(words)


class Lines:
    """The events as plain lines, for a log file or a CI page: starts and ends of stages, and one line of progress every 30 s.

    Where several stages are at work, they take turns.
    """

    def __init__(self, write: Callable[[str], None], every: float = 30.0, clock: Callable[[], float] = time.monotonic):
        self.write, self.every, self.clock = write, every, clock
        self._last = clock()
        self._began: dict[str | None, float] = {}
        self._latest: dict[str | None, str] = {}
        self._pace = Pace()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, event: Any) -> None:
        """Print what of the event a log should have."""
        stage, now = event.stage, self.clock()
        if event.kind == "stage_started":
            self._began[stage] = now
            self.write(f"{stage}: started")
        elif event.kind == "progress":
            parts = (position(event.data), metrics_text(event.data.get("metrics") or {}), self._pace.text(event))
            self._latest[stage] = f"{stage}: " + " · ".join(text for text in parts if text)
            if now - self._last >= self.every:
                self._last = now
                turn = next(iter(self._latest))
                self.write(self._latest.pop(turn))  # told; it is at the back of the queue when it moves again
        else:
            self._latest.pop(stage, None)
            text = line(event, took(event, now - self._began[stage] if stage in self._began else None))
            if text:
                self.write(text)


def took(event: Any, measured: float | None) -> str:
    """How long the stage took: its own word, or what was measured here."""
    seconds = event.data.get("seconds", measured)
    return numbers.duration(seconds) if isinstance(seconds, (int, float)) else ""


def extent(data: dict[str, Any]) -> tuple[float | None, float | None, str]:
    """(done, total, unit) of a progress event; one that only tells a share is in percent."""
    if data.get("done") is None and isinstance(data.get("progress"), (int, float)):
        return 100 * data["progress"], 100, "%"
    return data.get("done"), data.get("total"), data.get("unit") or ""


def position(data: dict[str, Any]) -> str:
    """`40 % of 488 steps`, or what is known of it."""
    (done, total, unit), text = extent(data), clean(data.get("text") or "")
    if done is None or not total:
        return text or (f"{numbers.count(done)} {unit}".strip() if done is not None else "at work")
    share = f"{100 * done / total:.0f} %"
    return " · ".join(part for part in (share if unit in ("%", "") else f"{share} of {numbers.count(total)} {unit}", text) if part)


def line(event: Any, took: str = "") -> str:
    """One line for an event that is not progress; empty where nobody needs one."""
    text = clean(event.data.get("text", ""))
    if event.kind == "stage_cached":
        return f"{event.stage}: cached" + (f" ({text})" if text else "")
    if event.kind == "stage_finished":
        return f"{event.stage}: done" + (f" in {took}" if took else "")
    if event.kind == "stage_failed":
        error = event.data.get("error") or {}
        what = (error.get("said") or "").splitlines()[:1] if error.get("what") == f"stage {event.stage} failed" else [error.get("what", "")]
        what = what[0] if what else ""
        return style(f"{event.stage}: failed", fg="red") + (f": {clean(what)}" if what else "")
    if event.kind == "log":
        return f"{event.stage}: {text}" if event.stage else text
    if event.kind == "warning":
        return style("warning", fg="yellow") + f": {event.stage + ': ' if event.stage else ''}{text}"
    return ""  # `interrupted` is told by the error that follows it
