"""A Python function over numpy arrays in, its machine code (numba) out, kept in the user's cache folder between processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning (rows that are not finite must be seen).
FAST = {"reassoc", "contract", "nsz", "arcp"}


def cache_folder(*sources: str) -> Path | None:
    """Where machine code of the functions in `sources` is kept: None where nothing can be written (then every process compiles for itself).

    `$NUMBA_CACHE_DIR`, else `$XDG_CACHE_HOME/saehub` or `~/.cache/saehub`. numba looks at the file of the outer function only, so
    the name holds a hash over all of them.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "saehub" / "numba"
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:12]
    folder = base / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return None
    return folder


def compiler(*sources: str) -> Callable[[Callable], Any]:
    """A decorator: compile at the first call, without the interpreter lock while it runs, for the functions in these files."""
    import numba

    folder = cache_folder(*sources)

    def decorate(function: Callable) -> Any:
        held = numba.config.CACHE_DIR
        try:  # numba reads the folder while it decorates
            numba.config.CACHE_DIR = str(folder or "")
            return numba.njit(fastmath=FAST, nogil=True, error_model="numpy", cache=folder is not None)(function)
        finally:
            numba.config.CACHE_DIR = held

    return decorate
