"""The store and the run folders that use it in; what no run needs out, and its removal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from saehub.errors import StageFailed
from saehub.report.run_folder import RunFolder

SKIP = ("locks",)
"""Folders of the store that hold no results."""


@dataclass(frozen=True)
class Entry:
    """One folder of the store that can go."""

    kind: str
    path: Path
    bytes: int
    """Bytes that only this folder holds: a file that a run folder shares by hard link frees nothing."""
    why: str


def unused(base: Path, runs: Iterable[Path]) -> list[Entry]:
    """Results that no run's recipe.lock names, half-done states that no run can continue, and leftovers of killed processes."""
    wanted: set[Path] = set()
    for path in runs:
        for stage in RunFolder(path).lock.get("stages", {}).values():
            wanted.add(base / "store" / stage["kind"] / stage["key"][:20])
            wanted.add(base / "store" / "state" / stage["key"][:20])
    entries = []
    store = base / "store"
    for kind in sorted(store.iterdir()) if store.is_dir() else []:
        if not kind.is_dir() or kind.name in SKIP:
            continue
        for path in sorted(kind.iterdir()):
            why = _why(path, wanted)
            if why:
                entries.append(Entry(kind.name, path, _bytes(path), why))
    return entries


def _why(path: Path, wanted: set[Path]) -> str:
    if path.name.startswith("."):  # the scratch folder of a process: .<key>.<pid>
        pid = path.name.rpartition(".")[2]
        return "left by a process that is gone" if pid.isdigit() and not _alive(int(pid)) else ""
    return "" if path in wanted else "no run needs it"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(stat.st_size for stat in (file.stat() for file in files) if stat.st_nlink == 1)


def remove(base: Path, entries: Iterable[Entry]) -> None:
    """Remove them, unless a run is at work: it could be about to use one."""
    busy = at_work(base)
    if busy:
        raise StageFailed(
            "a run is at work in this store",
            where=busy,
            why="it may be about to read what would be removed",
            fix="wait for it to end, or stop it; then: saehub runs gc --yes",
        )
    for entry in entries:
        shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()


def at_work(base: Path) -> str | None:
    """Name of a lock that a living process holds, or None."""
    from filelock import FileLock, Timeout

    for path in sorted((base / "store" / "locks").glob("*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return path.name
        lock.release()
    return None
