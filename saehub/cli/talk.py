"""Text and plain data in; data on stdout and talk on stderr out, without rich: what every command and every error uses."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from saehub.report.text import clean

__all__ = ["SCHEMA", "State", "clean", "colour", "interactive", "out", "out_json", "out_json_line", "plain", "say", "style"]

SCHEMA = 1
"""Version of every `--json` object; raised when a field is renamed or removed, not when one is added."""


@dataclass
class State:
    """What one call of the program remembers from its options (click's `ctx.obj`)."""

    json: bool = False
    """`--json` was given: a failure is then also an object on stdout."""
    lines: bool = False
    """stdout is one JSON object a line: a failure is the last line."""
    command: str | None = None
    """What was typed."""


def colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that wants colour (NO_COLOR and TERM=dumb are respected)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and _is_terminal(stream)


def interactive(stream: TextIO | None = None) -> bool:
    """Whether a bar that redraws itself makes sense there: a terminal (stderr by default), not a CI log, not a dumb one."""
    return _is_terminal(stream or sys.stderr) and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # a closed or replaced stream
        return False


def style(text: str, stream: TextIO | None = None, **looks: Any) -> str:
    """`click.style`, or the bare text where `stream` (stderr by default) wants no colour."""
    return click.style(text, **looks) if colour(stream or sys.stderr) else text


def say(text: str = "") -> None:
    """One line of talk, on stderr."""
    click.echo(text, err=True, color=colour(sys.stderr))


def out(text: str = "") -> None:
    """One line of data, on stdout."""
    click.echo(text, color=colour(sys.stdout))


def out_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout, with its `schema` first; NaN and infinities become null."""
    click.echo(json.dumps(plain({"schema": SCHEMA, **data}), indent=2, allow_nan=False))


def out_json_line(data: dict[str, Any]) -> None:
    """One JSON object on one line of stdout: an event of a stream."""
    click.echo(json.dumps(plain(data), separators=(",", ":"), allow_nan=False))


def plain(value: Any) -> Any:
    """Dataclasses, paths, tuples and odd numbers as JSON knows them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    return str(value)
