"""A run folder in; its card, lock, results, events and checkpoints out, as far as they exist; imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from saehub.api import Measurement
from saehub.errors import FormatError, UsageError, did_you_mean
from saehub.jsonio import read_json
from saehub.report import table

MARKS = ("recipe.lock", "run_card.json", "results.json")
"""A folder with one of these is a run folder."""
AGAIN = "restore it, or run the recipe again: what is finished takes no time"
_PROVENANCE = {"site": "", "target_site": "", "data": {"stream_hash": ""}, "trainer": {}}
CARD: dict[str, Any] = {
    "model": {"shape": {}}, "data": {"*": {"policy": {}, "tokenizer": {}, "sources": [{}], "rows": 0}}, "extract": {"sites": [""]},
    "saes": {"*": {"provenance": _PROVENANCE, "params": {}, "config": {}, "d_in": 0, "d_sae": 0, "d_out": 0, "rows": 0, "steps": 0, "batch": 0, "seconds": 0,
                   "rows_per_second": 0}},
    "exports": {"*": {}}, "stages": {"*": {}}, "errors": [{}], "warnings": [], "preflight": [{}], "resume_changes": [""], "verdicts": {"*": {}},
    "environment": {"libraries": {}}, "seconds": 0, "peak_memory": 0,
}  # fmt: skip
"""What readers of `run_card.json` rely on: `*` stands for every key, a list's entry for all of its entries, 0 for any number; null goes anywhere."""
LOCK: dict[str, Any] = {"recipe": {"name": ""}, "stages": {"*": {"key": "", "where": ""}}, "plugins": {"*": {}}, "components": {"*": {}}}
"""Of `recipe.lock`."""


def misshaped(value: Any, like: Any, at: str = "") -> str | None:
    """Where a JSON document is not of the types of `like` (see `CARD`), in words; None where it is."""
    kinds = (int, float) if isinstance(like, int) else type(like)
    if value is None:
        return None
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = "a number" if isinstance(like, int) else {dict: "a map", list: "a list", str: "text"}[type(like)]
        return f"{at.lstrip('.') or 'it'} is {value!r:.80}, expected {wanted}"
    if isinstance(like, dict):
        pairs = [(key, value[key], like.get(key, like.get("*"))) for key in value]
    else:
        pairs = [(index, item, like[0]) for index, item in enumerate(value)] if isinstance(like, list) and like else []
    return next((reason for key, item, kind in pairs if kind is not None and (reason := misshaped(item, kind, f"{at}.{key}"))), None)


@dataclass(frozen=True)
class RunFolder:
    """One run on disk; every part is read on first use, and absent parts are empty."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def _json(self, name: str, like: dict[str, Any]) -> dict:
        file = self.path / name
        data = read_json(file) if file.is_file() else {}
        if not isinstance(data, dict):
            raise FormatError(f"{file} is not a JSON object", why=f"it holds a {type(data).__name__}", fix=AGAIN)
        if reason := misshaped(data, like):
            raise FormatError(f"{file} was changed or damaged", why=reason, fix=AGAIN)
        return data

    @cached_property
    def card(self) -> dict[str, Any]:
        """`run_card.json`: the facts that the pipeline recorded."""
        return self._json("run_card.json", CARD)

    @cached_property
    def lock(self) -> dict[str, Any]:
        """`recipe.lock`: keys, versions, hashes."""
        return self._json("recipe.lock", LOCK)

    @cached_property
    def measurements(self) -> list[Measurement]:
        """`results.json`."""
        rows = [table.measurement(row or {}) for row in self._json("results.json", {"measurements": [{"subjects": [], "subject_hashes": []}]}).get("measurements") or []]
        for index, row in enumerate(rows):
            if reason := row.wrong():
                raise FormatError(f"{self.path / 'results.json'}: measurement {index} ({row.metric!r:.80}) was changed or damaged", why=reason, fix=AGAIN)
        return rows

    @cached_property
    def events(self) -> list:
        """`events.jsonl` (`saehub.pipeline.events.Event`)."""
        from saehub.pipeline.events import read_events

        file = self.path / "events.jsonl"
        return read_events(file) if file.is_file() else []

    @property
    def status(self) -> str:
        """`finished`, `failed`, `interrupted`, `unfinished` (at work, or killed) or `unknown`."""
        words = {"run_finished": "finished", "interrupted": "interrupted", "run_started": "unfinished"}
        told = next((words[event.kind] for event in reversed(self.events) if event.kind in words), None)
        if told in (None, "unfinished") and self._card_is_newer():  # the card is written before the last event, and a failed run has none
            return str(self.card.get("status") or "unknown")
        return told or "unknown"

    def _card_is_newer(self) -> bool:
        """Whether the card was written after the run last started; `written` has whole seconds."""
        try:
            written = datetime.strptime(str(self.card.get("written")), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        except ValueError:
            return bool(self.card) and self.when is None
        return self.when is None or written >= int(self.when)

    @property
    def when(self) -> float | None:
        """Seconds since the epoch at which the run (last) started."""
        return next((event.t for event in reversed(self.events) if event.kind == "run_started"), None)

    def stages(self) -> dict[str, str]:
        """What became of each stage since the run last started, in its own order: `finished`, `cached`, `failed: …`, `begun: 316 of 3,906 steps`
        or `not begun`; empty where no events tell."""
        found: dict[str, str] = {}
        for event in self.events:
            if event.kind == "run_started":
                found = dict.fromkeys(event.data.get("stages") or (), "not begun")
            elif event.kind in ("stage_finished", "stage_cached"):
                found[event.stage] = event.kind.removeprefix("stage_")
            elif event.kind == "stage_failed":
                found[event.stage] = f"failed: {(event.data.get('error') or {}).get('what', '')}"
            elif event.kind == "stage_started":
                found[event.stage] = "begun"
            elif event.kind == "progress" and event.data.get("total"):
                done, total, unit = (event.data.get(name) for name in ("done", "total", "unit"))
                found[event.stage] = f"begun: {done:,} of {total:,} {unit or ''}".rstrip()
        return found

    @property
    def resume(self) -> str | None:
        """The command that goes on with a run which is not finished."""
        if self.status not in ("failed", "interrupted", "unfinished"):
            return None
        return self.lock.get("command") or shlex.join(["saehub", "recipe", "run", str(self.path / "recipe.yaml"), "--out", str(self.path)])

    def checkpoints(self) -> dict[str, Path]:
        """`{"native-k32": folder}` of the finished checkpoints."""
        folder = self.path / "checkpoints"
        return {path.name: path for path in sorted(folder.glob("*")) if (path / "saehub.json").is_file()} if folder.is_dir() else {}

    def exports(self) -> dict[str, dict[str, Path]]:
        """`{"saelens": {"native-k32": folder}}`."""
        folder = self.path / "exports"
        if not folder.is_dir():
            return {}
        return {
            form.name: {path.name: path for path in sorted(form.iterdir()) if path.is_dir()}
            for form in sorted(folder.iterdir())
            if form.is_dir()
        }


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder."""
    return path.is_dir() and any((path / mark).is_file() for mark in MARKS)


def find(name: str, known: Iterable[Path]) -> RunFolder:
    """A run by path (also of its run_card.json), by name, by the unique beginning of its name, or `last`; else a UsageError."""
    known = list(known)
    path = Path(name)
    if path.name in (*MARKS, "run_card.md", "report.html") and path.is_file():
        path = path.parent
    if is_run(path):
        return RunFolder(path.absolute())
    if name == "last" and known:
        return RunFolder(known[-1])
    hits = [run for run in known if run.name == name] or [run for run in known if run.name.startswith(name)]
    if len(hits) == 1:
        return RunFolder(hits[0])
    names = [run.name for run in known]
    if hits:
        raise UsageError(
            f"{name!r} is the beginning of {len(hits)} runs", why=", ".join(run.name for run in hits), fix="write one of them in full"
        )
    why = f"{path} is a folder, but has no {', '.join(MARKS[:-1])} or {MARKS[-1]}" if path.is_dir() else None
    raise UsageError(
        f"there is no run {name!r}{did_you_mean(name, names)}", why=why, fix="saehub runs ls" if names else "saehub recipe run topk-llama"
    )
