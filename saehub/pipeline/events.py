"""What a run does, as it does it, in; one stream of typed events that progress bars, JSON lines and the log all read, out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KINDS = (
    "run_started",
    "stage_started",
    "stage_cached",
    "progress",
    "log",
    "warning",
    "stage_finished",
    "stage_failed",
    "interrupted",
    "run_finished",
)


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    kind: str
    """One of `KINDS`."""
    stage: str | None = None
    """Stage id, such as `train/native-k32`."""
    data: dict[str, Any] = field(default_factory=dict)
    """progress: `done`, `total`, `unit`, `metrics`, `rate`; stage_failed: `error`; log, warning: `text`."""
    t: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def to_json(self) -> str:
        """One JSON line; NaN becomes null so that every reader can parse it."""
        return json.dumps(_finite(asdict(self)), separators=(",", ":"), default=str)


Listener = Callable[[Event], None]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class EventLog:
    """Appends every event to `events.jsonl`, one flushed line each, so that a killed run still has its history."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def __call__(self, event: Event) -> None:
        self._stream.write(event.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Events:
    """Sends each event to all listeners; a listener that raises is dropped, it must not end the run."""

    def __init__(self, listeners: Iterable[Listener] = ()):
        self._listeners = list(listeners)

    def add(self, listener: Listener) -> None:
        """One more reader."""
        self._listeners.append(listener)

    def __call__(self, kind: str, stage: str | None = None, **data: Any) -> None:
        event = Event(kind, stage, data)
        for listener in list(self._listeners):
            try:
                listener(event)
            except (Exception,) as error:
                self._listeners.remove(listener)
                if self._listeners:
                    self("warning", None, text=f"an event listener failed and was dropped: {type(error).__name__}: {error}")


def read_events(path: Path) -> list[Event]:
    """The events of a run folder; a line cut off by a kill, or that is no event, is left out."""
    events = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if isinstance(data, dict) and isinstance(data.get("kind"), str) and isinstance(data.get("data", {}), dict) and isinstance(data.get("t", 0.0), (int, float)):
            events.append(Event(data["kind"], data.get("stage"), data.get("data", {}), data.get("t", 0.0)))
    return events
