"""The readers of the event stream: a line every 30 s for logs, bars for terminals."""

from __future__ import annotations

import io

import pytest

from saehub.cli.running import Lines, Pace, line, metrics_text, position
from saehub.pipeline.events import Event

pytestmark = pytest.mark.quick


def progress(stage: str, done: int, t: float, rows: int | None = None, **more) -> Event:
    data = {
        "done": done,
        "total": 100,
        "unit": "steps",
        "rows": done * 1000 if rows is None else rows,
        "metrics": {"loss": 0.5, "fvu": 0.25, "l0": 32.0, "dead": 0.031, "lr": 1e-3},
    }
    return Event("progress", stage, {**data, **more}, t)


def test_one_line_every_30_seconds_whatever_is_told():
    now, told = [0.0], []
    lines = Lines(told.append, clock=lambda: now[0])
    lines(Event("stage_started", "train/a", {}, 0.0))
    for second in range(1, 100):
        now[0] = float(second)
        lines(progress("train/a", second, float(second)))
    assert [text.partition(" · ")[0] for text in told] == [
        "train/a: started",
        "train/a: 30 % of 100 steps",
        "train/a: 60 % of 100 steps",
        "train/a: 90 % of 100 steps",
    ]
    assert told[1] == "train/a: 30 % of 100 steps · loss 0.5 · FVU 0.25 · L0 32.0 · dead 3.1 % · 1k tokens/s · 1 min 10 s to go"


def test_stages_take_turns():
    now, told = [0.0], []
    lines = Lines(told.append, clock=lambda: now[0])
    for second in range(1, 130):
        now[0] = float(second)
        for stage in ("train/a", "train/b", "train/c"):
            lines(progress(stage, second % 100, float(second)))
    assert [text.partition(":")[0] for text in told] == ["train/a", "train/b", "train/c", "train/a"]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Event("stage_cached", "tokens/x", {}), "tokens/x: cached"),
        (Event("stage_finished", "train/a", {"seconds": 61.0}), "train/a: done in 1 min 01 s"),
        (Event("stage_failed", "train/a", {"error": {"what": "NaN\x1b[2J"}}), "train/a: failed: NaN\\x1b[2J"),
        (Event("log", None, {"text": "loading"}), "loading"),
        (Event("log", "train/a", {"text": "going on"}), "train/a: going on"),
        (Event("warning", "train/a", {"text": "resume: inexact"}), "warning: train/a: resume: inexact"),
        (Event("interrupted", None, {"error": {"what": "stopped"}}), ""),
        (Event("run_started", None, {}), ""),
        (Event("run_finished", None, {}), ""),
    ],
    ids=lambda value: value.kind if isinstance(value, Event) else "",
)
def test_every_kind_of_event(event, text):
    told: list[str] = []
    Lines(told.append)(event)
    assert told == ([text] if text else [])


def test_every_kind_is_in_this_test():
    from saehub.pipeline.events import KINDS

    told = {
        "stage_started",
        "progress",
        "stage_cached",
        "stage_finished",
        "stage_failed",
        "log",
        "warning",
        "interrupted",
        "run_started",
        "run_finished",
    }
    assert set(KINDS) == told


def test_pace_is_the_average_since_the_stage_began():
    """A block of forward passes (here 10 s) stands between steps: the average does not swing with it."""
    pace = Pace()
    assert pace.text(progress("a", 1, 0.0)) == ""
    assert pace.text(progress("a", 2, 10.0)) == "100 tokens/s · 16 min 20 s to go"
    assert pace.text(progress("a", 11, 10.0)) == "1k tokens/s · 1 min 29 s to go"
    assert pace.text(progress("a", 21, 20.0)) == "1k tokens/s · 1 min 19 s to go"


def test_a_stage_that_only_tells_a_share():
    data = {"progress": 0.325, "text": "65,024 of 200,000 rows", "unit": "tokens"}
    assert position(data) == "32 % · 65,024 of 200,000 rows"
    pace = Pace()
    pace.text(Event("progress", "t", {"progress": 0.2}, 0.0))
    assert pace.text(Event("progress", "t", {"progress": 0.6}, 10.0)) == "10 s to go"
    assert position({}) == "at work"
    assert position({"done": 1200, "unit": "rows"}) == "1,200 rows"


def test_metrics_that_are_not_told_are_left_out():
    assert metrics_text({"loss": 0.25, "dead": None}) == "loss 0.25"
    assert metrics_text({}) == ""
    assert line(Event("progress", "a", {})) == ""


def test_bars_on_a_terminal():
    """What stands on the screen while a stage is at work, and what stays when it is done."""
    from rich.console import Console

    from saehub.cli.render import Bars

    screen = io.StringIO()
    with Bars(Console(file=screen, force_terminal=True, width=140, color_system=None, markup=False, highlight=False)) as bars:
        bars(Event("stage_cached", "tokens/train", {}, 0.0))
        bars(Event("stage_started", "train/[bold]a", {}, 0.0))
        bars(progress("train/[bold]a", 10, 1.0))
        bars(progress("train/[bold]a", 40, 11.0))
        bars._bars.refresh()
        bars(Event("stage_finished", "train/[bold]a", {"seconds": 12.0}, 12.0))
        bars(Event("stage_failed", "evaluate/x", {"error": {"what": "no"}}, 13.0))
    shown = screen.getvalue()
    for words in (
        "✓ tokens/train: cached",
        "train/[bold]a",
        "40%",
        "loss 0.5 · FVU 0.25 · L0 32.0 · dead 3.1 %",
        "3k tokens/s · 20 s to go",
        "✓ train/[bold]a: done in 12 s",
        "✗ evaluate/x: failed: no",
    ):
        assert words in shown, words


@pytest.mark.parametrize(("env", "kind"), [({}, "Lines"), ({"CI": "1"}, "Lines")])
def test_a_log_gets_lines(saehub, monkeypatch, env, kind):
    from saehub.cli.running import watcher

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert type(watcher()).__name__ == kind


def test_a_terminal_gets_bars_but_not_in_ci(home, monkeypatch):
    from saehub.cli import running, talk

    monkeypatch.setattr(talk, "_is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    assert type(running.watcher()).__name__ == "Bars"
    monkeypatch.setenv("CI", "true")
    assert type(running.watcher()).__name__ == "Lines"
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert type(running.watcher()).__name__ == "Lines"


def test_the_command_that_shows_a_run_finds_it_from_anywhere(home, tmp_path, capsys):
    import shlex

    from saehub.cli.running import farewell
    from saehub.pipeline.run import RunResult

    for folder, name in ((home / "runs" / "r", "r"), (tmp_path / "run ü one", str(tmp_path / "run ü one"))):
        farewell(RunResult(folder, (), {}, 1.0))
        (look,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("look:")]
        assert shlex.split(look)[1:] == ["saehub", "runs", "show", name]
