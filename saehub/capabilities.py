"""Names that an adapter expects in its library in; the objects behind them, or one error that names both versions, out. Capabilities, not version strings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from saehub.errors import MissingDependency


@dataclass(frozen=True)
class Library:
    """A wrapped library, and the version that its adapter was written against."""

    module: str
    """Import name, such as `dictionary_learning`."""
    distribution: str
    """Name on PyPI, such as `dictionary-learning`."""
    written_for: str
    """The version that the adapter was written and tested against."""

    @property
    def installed(self) -> str:
        """The version that is installed, or `unknown`."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "unknown"

    def take(self, path: str, *, parameters: Iterable[str] = (), attributes: Iterable[str] = ()) -> Any:
        """The object `"package.module:Name.attribute"` (or a module, without a colon).

        Raises MissingDependency, with both versions, if it is not there, if calling it does not take one of `parameters` by name, or if it
        has no attribute of `attributes`. An import that fails for another reason keeps its own words.
        """
        module_name, _, name = path.partition(":")
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
                raise  # something that the library itself needs
            raise self._gone(f"there is no module {error.name or module_name}") from error
        for part in name.split(".") if name else ():
            if not hasattr(found, part):
                raise self._gone(f"there is no {part!r} in {getattr(found, '__name__', module_name)}")
            found = getattr(found, part)
        self.has(found, path, *attributes)
        if parameters:
            accepted = inspect.signature(found).parameters
            absent = [parameter for parameter in parameters if parameter not in accepted]
            if absent and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
                raise self._gone(f"{path} no longer takes {', '.join(absent)}")
        return found

    def has(self, thing: Any, called: str, *attributes: str) -> None:
        """Raise MissingDependency, with both versions, unless `thing` has all the attributes."""
        absent = [attribute for attribute in attributes if not hasattr(thing, attribute)]
        if absent:
            raise self._gone(f"{called} has no {', '.join(map(repr, absent))}")

    def _gone(self, what: str) -> MissingDependency:
        return MissingDependency(
            f"{self.module} is not what its adapter expects: {what}",
            why=f"{self.distribution} {self.installed} is installed; the adapter was written for {self.written_for}",
            fix=f"pip install '{self.distribution}=={self.written_for}'",
        )
