"""Installed entry points in; a catalogue of components, architectures and recipes out, in which one broken plugin is one red row."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from saehub.api import API_VERSION, KINDS, NEEDS, ArchitectureEntry, Component
from saehub.errors import MissingDependency, SaehubError, StageFailed, UsageError, did_you_mean

GROUP = "saehub.plugins"
ALL_KINDS = (*KINDS, "results")
"""What a recipe can name, and formats of result files."""
OWN = "saehub"
"""The distribution whose plugins nobody can shadow."""
SLOW_SECONDS = 1.0
"""A plugin whose registration takes longer is told so."""


@dataclass(frozen=True)
class Registered:
    """A component (or architecture) and who provides it."""

    kind: str
    component: Component | ArchitectureEntry
    plugin: str
    distribution: str
    version: str

    @property
    def entry(self) -> Component | ArchitectureEntry:
        """The registration itself."""
        return self.component

    @property
    def name(self) -> str:
        """The name within the plugin."""
        return self.component.name

    @property
    def address(self) -> str:
        """`plugin/name`."""
        return f"{self.plugin}/{self.component.name}"

    def load(self) -> Any:
        """The class behind `target`; a library that is missing or fails to import is an error that says so."""
        return _load(self.component.target, self)

    def load_config(self) -> type | None:
        """The config dataclass, or None; anything else is an error that says so."""
        if not self.component.config:
            return None
        config = _load(self.component.config, self)
        if not (isinstance(config, type) and is_dataclass(config)):
            raise StageFailed(
                f"the config {self.component.config!r} of {self.address} is not a dataclass",
                where=f"{self.distribution} {self.version}",
                fix="put @dataclass(frozen=True) above the class, with a default for every setting that has one",
            )
        return config

    def library_versions(self) -> dict[str, str]:
        """Version of the plugin's own distribution and of those that hold the `requires` modules (absent ones left out)."""
        versions = {self.distribution: self.version}
        for module in getattr(self.component, "requires", ()):
            for distribution in _distributions_of(module):
                versions[distribution] = metadata.version(distribution)
        return versions


@lru_cache(maxsize=1)
def _packages() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _distributions_of(module: str) -> list[str]:
    return sorted(set(_packages().get(module.partition(".")[0], ())))


def _load(target: str, registered: Registered) -> Any:
    module_name, _, attribute = target.partition(":")
    try:
        value = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(value, part):
                raise StageFailed(
                    f"{registered.address} points at {target!r}, but {module_name} has no {attribute!r}{did_you_mean(part, dir(value))}",
                    where=f"{registered.distribution} {registered.version}",
                    fix="correct `target` or `config` in the plugin's registration",
                )
            value = getattr(value, part)
    except SaehubError:
        raise
    except ModuleNotFoundError as error:
        absent = error.name or str(error)
        if absent == module_name or module_name.startswith(f"{absent}."):
            raise StageFailed(
                f"{registered.address} points at {target!r}, but there is no module {absent!r}",
                where=f"{registered.distribution} {registered.version}",
                fix="correct `target` or `config` in the plugin's registration",
            ) from error
        raise MissingDependency(
            f"{registered.address} needs the module {absent!r}, which is not installed", where=target, fix=_pip(registered, [absent])
        ) from error
    except (Exception, SystemExit) as error:
        raise StageFailed(
            f"{registered.address} could not be loaded",
            where=target,
            fix=f"report it to the authors of {registered.distribution} {registered.version}; SAEHUB_TRACE=1 shows the whole trace",
            said=f"{type(error).__name__}: {error}",
        ) from error
    return value


def _pip(registered: Registered, absent: list[str]) -> str:
    """The command that installs what a component lacks: its extra where it has one, else the modules by name."""
    extra = getattr(registered.component, "extra", None)
    package = f"'{registered.distribution}[{extra}]'" if extra else " ".join(absent)
    return f"pip install {package}"


@dataclass
class PluginRow:
    """One line of `saehub plugins ls`."""

    plugin: str
    distribution: str
    version: str
    status: str = "ok"
    """`ok`, `broken` or `disabled`."""
    error: str | None = None
    trace: str | None = None
    warning: str | None = None
    """What makes every command of its user slower, though it works."""
    components: list[Registered] = field(default_factory=list)
    architectures: list[Registered] = field(default_factory=list)
    recipes: list[Path] = field(default_factory=list)


class Catalog:
    """What all plugins offer. Built once; asking it never imports a component's target."""

    def __init__(self, rows: Iterable[PluginRow]):
        self._rows = list(rows)

    def rows(self) -> list[PluginRow]:
        """One row a plugin, broken and disabled ones included."""
        return list(self._rows)

    def components(self, kind: str) -> dict[str, Registered]:
        """`{"native/topk": Registered, …}` of one kind, sorted by address."""
        if kind not in ALL_KINDS:
            raise UsageError(f"there is no component kind {kind!r}{did_you_mean(kind, ALL_KINDS)}", fix=f"one of {', '.join(ALL_KINDS)}")
        found = {item.address: item for row in self._rows for item in row.components if item.kind == kind}
        return dict(sorted(found.items()))

    def find(self, kind: str, name: str) -> Registered:
        """By `plugin/name`, or by bare name while one plugin provides it; else a UsageError that lists the choices."""
        known = self.components(kind)
        if name in known:
            return known[name]
        by_bare = [item for item in known.values() if item.name == name]
        if len(by_bare) == 1:
            return by_bare[0]
        if by_bare:
            raise UsageError(
                f"{kind} {name!r} is provided by {len(by_bare)} plugins", fix=f"write one of: {', '.join(item.address for item in by_bare)}"
            )
        plugin, slash, _ = name.partition("/")
        row = next((row for row in self._rows if slash and row.plugin == plugin), None)
        if row is not None and row.status != "ok":
            raise UsageError(
                f"{kind} {name!r} belongs to the plugin {plugin!r}, which is {'broken' if row.error else 'switched off'}",
                why=row.error and row.error.splitlines()[0],
                fix=f"mend or uninstall {row.distribution} (saehub plugins ls --trace)" if row.error else "unset SAEHUB_DISABLE_PLUGINS",
            )
        other = next((item.kind for row in self._rows for item in row.components if name in (item.address, item.name)), None)
        if other is not None:
            raise UsageError(f"{name!r} is {_a(other)}, not {_a(kind)}", fix=f"installed {kind}s: {', '.join(known) or 'none'}")
        hint = did_you_mean(name, [*known, *(item.name for item in known.values())])
        broken = [row.plugin for row in self._rows if row.status == "broken"]
        why = f"broken plugins that might have provided it: {', '.join(broken)} (saehub plugins ls --trace)" if broken else None
        raise UsageError(
            f"no {kind} is called {name!r}{hint}",
            why=why,
            fix=f"installed {kind}s: {', '.join(known) or 'none'}",
        )

    def architectures(self) -> dict[str, Registered]:
        """Architectures that plugins register, by name; a plugin that repeats another's name is a broken row, so names are unique."""
        return {item.name: item for row in self._rows for item in row.architectures}

    def recipes(self) -> dict[str, Path]:
        """Recipes that plugins ship: `{"plugin/name": file}`."""
        return {f"{row.plugin}/{path.stem}": path for row in self._rows for path in row.recipes}

    def missing(self, registered: Registered) -> list[str]:
        """Import names of a component's libraries that are not installed; nothing is imported."""
        return [module for module in getattr(registered.component, "requires", ()) if not _installed(module)]

    def require(self, registered: Registered) -> None:
        """Raise MissingDependency with the pip command if a library is missing."""
        absent = self.missing(registered)
        if absent:
            raise MissingDependency(
                f"{registered.address} needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed",
                fix=_pip(registered, absent),
            )


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _named(variable: str) -> set[str]:
    return {word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()}


def discover(entry_points: Iterable[metadata.EntryPoint] | None = None) -> Catalog:
    """Import every plugin's registrations, each in isolation.

    saehub's own plugins come first, so that no other distribution can take their names; strangers that take the same name are all broken
    rows, because which of them a recipe would get must not depend on the order of discovery.
    `SAEHUB_DISABLE_PLUGINS=a,b` leaves plugins (or whole distributions) out; `SAEHUB_STRICT_PLUGINS=1` raises on the first broken one
    (for authors). What a plugin prints while it is imported goes to stderr: stdout is data.
    """
    points = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    disabled, strict = _named("SAEHUB_DISABLE_PLUGINS"), os.environ.get("SAEHUB_STRICT_PLUGINS") == "1"
    rows = [(_row(point), point) for point in sorted(set(points), key=_order)]
    for row, _ in rows:
        if row.plugin in disabled or row.distribution in disabled:
            row.status = "disabled"
    active = [row for row, _ in rows if row.status == "ok"]
    for row, point in rows:
        if row.status == "disabled":
            continue
        begun, heavy = time.monotonic(), "torch" in sys.modules
        try:
            with contextlib.redirect_stdout(sys.stderr):
                _refuse_clash(row, active)
                _register(row, point.load)
                _refuse_repeated_architecture(row, active)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit at import included: a plugin must not end the command
            if strict:
                raise
            row.status, row.error = "broken", str(error) if isinstance(error, SaehubError) else f"{type(error).__name__}: {error}"
            row.trace = traceback.format_exc()
            row.components, row.architectures, row.recipes = [], [], []
        row.warning = _heavy_import(time.monotonic() - begun, not heavy and "torch" in sys.modules)
    return Catalog(row for row, _ in rows)


def _heavy_import(seconds: float, torch: bool) -> str | None:
    """Registrations are data; every command pays for what their module imports."""
    if seconds < SLOW_SECONDS and not torch:
        return None
    why = f"its registration took {seconds:.1f} s" + (" and imports torch" if torch else "")
    return f"{why}; import heavy libraries inside functions, in the modules that `target` names"


def _row(point: metadata.EntryPoint) -> PluginRow:
    return PluginRow(point.name, point.dist.name if point.dist else "unknown", point.dist.version if point.dist else "")


def _order(point: metadata.EntryPoint) -> tuple:
    distribution = point.dist.name if point.dist else ""
    return distribution != OWN, point.name, distribution, point.value


def _refuse_clash(row: PluginRow, active: list[PluginRow]) -> None:
    """Two distributions, one plugin name: ours stays, everybody else's is refused."""
    if "/" in row.plugin:
        raise UsageError(f"a plugin cannot be called {row.plugin!r}", fix="an entry-point name without '/'")
    others = [other.distribution for other in active if other.plugin == row.plugin and other is not row]
    if others and row.distribution != OWN:
        raise UsageError(
            f"{len(others) + 1} installed distributions call their plugin {row.plugin!r}: {', '.join(sorted([*others, row.distribution]))}",
            fix=f"uninstall all but one, or leave one out: SAEHUB_DISABLE_PLUGINS={row.distribution}",
        )


def _refuse_repeated_architecture(row: PluginRow, active: list[PluginRow]) -> None:
    """An architecture's name stands in checkpoints, so it can mean one class only."""
    names = [item.name for item in row.architectures]
    if not names:
        return
    from saehub.checkpoint.registry import BUILT_IN

    taken = {entry.name: "saehub itself" for entry in BUILT_IN}
    taken |= {item.name: f"plugin {other.plugin}" for other in active if other is not row for item in other.architectures}
    for name in names:
        if name in taken:
            raise UsageError(f"architecture {name!r} is already provided by {taken[name]}", fix="choose another name for it")
        if names.count(name) > 1:
            raise UsageError(f"two architectures are called {name!r}", where=f"plugin {row.plugin}")


def _register(row: PluginRow, load: Callable[[], Any]) -> None:
    import pluggy

    from saehub import hookspecs

    manager = pluggy.PluginManager("saehub")
    manager.add_hookspecs(hookspecs)
    module = load()
    manager.register(module, name=row.plugin)
    for hook_name, function in _implementations(module):
        if hook_name not in hookspecs.HOOKS:
            raise UsageError(f"there is no hook {hook_name!r}{did_you_mean(hook_name, hookspecs.HOOKS)}", where=f"plugin {row.plugin}")
        if not hasattr(function, "saehub_impl"):
            raise UsageError(
                f"{hook_name} is not marked as an implementation", where=f"plugin {row.plugin}", fix="put @saehub.hookimpl above it"
            )
    manager.check_pending()

    for kind, hook_name in hookspecs.COMPONENT_HOOKS.items():
        for component in _results(manager, hook_name, row):
            _check_component(component, kind, row)
            row.components.append(Registered(kind, component, row.plugin, row.distribution, row.version))
    for entry in _results(manager, "saehub_architectures", row):
        if not isinstance(entry, ArchitectureEntry):
            raise UsageError(f"saehub_architectures returned a {type(entry).__name__}", fix="return a list of saehub.ArchitectureEntry")
        if not _dotted(entry.target):
            raise UsageError(f"architecture {entry.name!r} with target {entry.target!r} is not well formed", fix="target 'pkg.mod:Class'")
        row.architectures.append(Registered("architecture", entry, row.plugin, row.distribution, row.version))
    for path in _results(manager, "saehub_recipes", row):
        folder = Path(path)
        if not folder.exists():
            raise UsageError(
                f"saehub_recipes names {folder}, which does not exist", where=f"plugin {row.plugin}", fix="is it in the wheel?"
            )
        row.recipes += sorted(folder.glob("*.yaml")) if folder.is_dir() else [folder]


def _implementations(module: Any) -> Iterator[tuple[str, Any]]:
    """Everything the plugin calls `saehub_…` and could have meant as a hook."""
    for name in dir(module):
        value = getattr(module, name, None)
        if name.startswith("saehub_") and callable(value) and not isinstance(value, type):
            yield name, value


def _results(manager: Any, hook_name: str, row: PluginRow) -> list[Any]:
    found: list[Any] = []
    for implementation in getattr(manager.hook, hook_name).get_hookimpls():
        result = implementation.function()
        if result is None:
            raise UsageError(f"{hook_name} returned None", where=f"plugin {row.plugin}", fix="return a list, or delete the hook")
        if isinstance(result, (str, bytes)) or not isinstance(result, Iterable):
            raise UsageError(f"{hook_name} returned a {type(result).__name__}", where=f"plugin {row.plugin}", fix="return a list")
        found += list(result)
    return found


def _check_component(component: Any, kind: str, row: PluginRow) -> None:
    where = f"plugin {row.plugin}"
    if not isinstance(component, Component):
        raise UsageError(f"a {kind} hook returned a {type(component).__name__}", where=where, fix="return a list of saehub.Component")
    if component.api != API_VERSION:
        raise UsageError(
            f"{component.name} was written for API version {component.api}; this saehub has {API_VERSION}",
            where=where,
            fix=f"pip install -U {row.distribution} saehub",
        )
    for words in ("needs", "requires"):
        if isinstance(getattr(component, words), str):
            raise UsageError(f"{component.name}: {words} is a string", where=where, fix=f"{words}=({getattr(component, words)!r},)")
    unknown = sorted(set(component.needs) - NEEDS)
    if unknown:
        raise UsageError(
            f"{component.name} needs {unknown[0]!r}{did_you_mean(unknown[0], NEEDS)}", where=where, fix=f"known: {', '.join(sorted(NEEDS))}"
        )
    if (
        not component.name
        or "/" in component.name
        or not _dotted(component.target)
        or not (component.config is None or _dotted(component.config))
    ):
        raise UsageError(
            f"{kind} {component.name!r} with target {component.target!r} and config {component.config!r} is not well formed",
            where=where,
            fix="name without '/', target and config 'pkg.mod:Class'",
        )
    if any(other.kind == kind and other.name == component.name for other in row.components):
        raise UsageError(f"two {kind}s are called {component.name!r}", where=where)


def _dotted(target: Any) -> bool:
    """Whether it reads `package.module:Class`."""
    return isinstance(target, str) and re.fullmatch(r"[\w.]+:[\w.]+", target) is not None


@lru_cache(maxsize=1)
def catalog() -> Catalog:
    """The catalogue of this process (`catalog.cache_clear()` after installing something)."""
    return discover()
