"""Measurements and the name of a result format in; another library's result files out, and such files as measurements: plugins say how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saehub.api import Measurement
from saehub.errors import FormatError, UsageError
from saehub.report.run_folder import RunFolder


@dataclass(frozen=True)
class ForeignResults(RunFolder):
    """Result files of another library, as far as they can stand for a run: they have measurements and a name."""

    format: str = ""
    """The component that reads them."""

    @cached_property
    def measurements(self) -> list[Measurement]:
        """Read by the plugin."""
        return list(_reader(self.format).read(self.path))

    @property
    def status(self) -> str:
        """There is no run behind them."""
        return f"results read by {self.format}"


def foreign(path: Path) -> ForeignResults | None:
    """The result file (or folder of them) at `path`, if a plugin knows it; None where none does. Two that do are a UsageError."""
    if not path.exists():
        return None
    from saehub.plugins import catalog

    known = [address for address in catalog().components("results") if _reader(address).sniff(path)]
    if len(known) > 1:
        raise UsageError(f"{path} could be results of {', '.join(known)}", fix="remove what is not meant from the folder")
    return ForeignResults(path.absolute(), known[0]) if known else None


def _reader(address: str) -> Any:
    from saehub.plugins import catalog

    return catalog().find("results", address).load()(None)


def check(wanted: str) -> None:
    """Raise, before any work, where `NAME` or `NAME=DIR` names no format, or its library is missing."""
    from saehub.plugins import catalog

    catalog().require(catalog().find("results", wanted.partition("=")[0]))


def write(measurements: Sequence[Measurement], wanted: str, run_dir: Path) -> dict[str, Any]:
    """Write `measurements` as `NAME` or `NAME=DIR` says (default: `results/NAME` in the run folder).

    Returns `{"format", "folder", "files", "left_out"}`; FormatError where the format can say none of them.
    """
    from saehub.pipeline.components import call_component
    from saehub.plugins import catalog

    name, _, folder = wanted.partition("=")
    registered = catalog().find("results", name)
    target = Path(folder).absolute() if folder else run_dir / "results" / registered.name
    told = call_component(registered, None, "write", measurements=list(measurements), folder=target)
    if not told["files"]:
        raise FormatError(f"{registered.address} can say none of these results", why="; ".join(told["left_out"]) or None)
    return {"format": registered.address, "folder": str(target), **told}
