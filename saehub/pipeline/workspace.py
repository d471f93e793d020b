"""A key in; the folder that holds its result, its lock and its half-finished state out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saehub.errors import StageFailed
from saehub.jsonio import read_json, write_json_atomic

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota, limit on the size of a file


def home() -> Path:
    """`$SAEHUB_HOME`, or `.saehub` in the working directory; `store/` and `runs/` lie below it."""
    return Path(os.environ.get("SAEHUB_HOME") or ".saehub").absolute()


def runs(base: Path | None = None) -> list[Path]:
    """Run folders, oldest first."""
    folder = (base or home()) / "runs"
    found = [path for path in folder.glob("*") if (path / "recipe.lock").is_file()] if folder.is_dir() else []
    return sorted(found, key=lambda path: (path / "recipe.lock").stat().st_mtime)


class Store:
    """Finished results by content key: `store/<kind>/<key>/`, complete iff its manifest is there."""

    def __init__(self, base: Path):
        self.base = Path(base)

    def path(self, kind: str, key: str) -> Path:
        """Where the result of `key` lies, or will lie."""
        return self.base / "store" / kind / key[:20]

    def state_path(self, key: str) -> Path:
        """Where a half-done training keeps its state."""
        return self.base / "store" / "state" / key[:20]

    def complete(self, kind: str, key: str) -> bool:
        """Whether the result is there and whole."""
        return (self.path(kind, key) / MANIFEST).is_file()

    def manifest(self, kind: str, key: str) -> dict:
        """What was recorded when it was made."""
        return read_json(self.path(kind, key) / MANIFEST)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """One process at a time works on a key; the lock dies with its holder, also after kill -9."""
        from filelock import FileLock, Timeout

        folder = self.base / "store" / "locks"
        _make(folder)
        lock = FileLock(folder / f"{key[:20]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def create(self, kind: str, key: str, manifest: dict) -> Iterator[Path]:
        """A scratch folder that becomes the result, manifest last, when the block ends without an error; removed otherwise."""
        final = self.path(kind, key)
        scratch = final.with_name(f".{final.name}.{os.getpid()}")
        for wreck in final.parent.glob(f".{final.name}.*"):  # left by a kill: whoever makes a key holds its lock
            shutil.rmtree(wreck, ignore_errors=True)
        _make(scratch)
        try:
            with disk_errors(scratch):
                yield scratch
                write_json_atomic(scratch / MANIFEST, manifest)
                shutil.rmtree(final, ignore_errors=True)  # what is there without a manifest is wreckage
                os.replace(scratch, final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _make(folder: Path) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """A full disk, a quota or a read-only folder becomes a StageFailed that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        raise (disk_error(error, where) or error) from error
    except Exception as error:
        text = str(error)  # safetensors reports the system's error as its own exception, with the number in its words
        if any(f"os error {number})" in text for number in FULL):
            raise _full(where, text) from error
        raise


def disk_error(error: OSError, where: Path) -> StageFailed | None:
    """The StageFailed for a disk error, or None where it is another kind of error."""
    if error.errno in FULL:
        return _full(where, str(error))
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR) or (error.errno == errno.ENOENT and not Path(where).exists()):
        return StageFailed(f"{where} cannot be written", why=str(error), fix="choose another folder: export SAEHUB_HOME=/path/with/space (and --out, where it was given)")
    return None


def _full(where: Path, why: str) -> StageFailed:
    return StageFailed(
        f"the disk that holds {where} is full, or a quota is used up",
        why=why,
        fix="saehub runs gc frees what no run needs; or move the store: export SAEHUB_HOME=/path/with/space. Finished stages are kept; the same command goes on",
    )


def free_bytes(folder: Path) -> int:
    """Free disk space where `folder` is, or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def link_or_copy(source: Path, destination: Path) -> None:
    """Give a finished folder a second name: hard links where the file system has them, copies elsewhere; atomic by rename."""
    destination = Path(destination)
    scratch = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)

    def one(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, scratch, copy_function=one, ignore=shutil.ignore_patterns(MANIFEST))
    if destination.exists():
        shutil.rmtree(destination)
    os.replace(scratch, destination)
