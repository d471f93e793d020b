"""A component and a list of named checks in; a report out: one row a check, with what was seen where a promise is broken."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import CheckFailed, SaehubError, UsageError
from saehub.plugins import Registered, catalog

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.pipeline.components import Components


@dataclass(frozen=True)
class Check:
    """One promise and whether it was kept."""

    name: str
    """Such as `save and restore`."""
    ok: bool
    detail: str = ""
    """What was measured, or what was seen instead."""


@dataclass(frozen=True)
class ConformanceReport:
    """What a suite found."""

    kind: str
    component: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The rows that are not ok."""
        return tuple(check for check in self.checks if not check.ok)

    def raise_if_failed(self) -> ConformanceReport:
        """Raise CheckFailed with the whole table, or return the report."""
        if not self.ok:
            raise CheckFailed(
                f"{self.kind} {self.component} breaks {len(self.failures)} of {len(self.checks)} promises",
                why=f"\n{self}",
                where=self.component,
            )
        return self

    def to_json(self) -> dict:
        """Plain data."""
        return {"kind": self.kind, "component": self.component, "ok": self.ok, "checks": [vars(check) for check in self.checks]}

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        return "\n".join(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.detail}".rstrip() for check in self.checks)


def run_checks(
    kind: str,
    component: str,
    checks: Sequence[tuple[str, Callable[[], str | None]]],
    only: Collection[str] | None = None,
    close: Callable[[], None] = lambda: None,
) -> ConformanceReport:
    """Call every check (or those named in `only`); a returned string is the detail of a kept promise, anything raised is a broken one.

    What a check leaves behind in the process (gradient mode, threads, random states) is put back, so that the next one starts clean. `close` is called at the end.
    """
    unknown = sorted(set(only or ()) - {name for name, _ in checks})
    if unknown:
        raise UsageError(f"there is no check {unknown[0]!r}", fix=f"one of: {', '.join(name for name, _ in checks)}")
    rows = []
    try:
        for name, check in checks:
            if only is None or name in only:
                rows.append(_told_once(_run_check(name, check), rows))
    finally:
        close()
    return ConformanceReport(kind, component, tuple(rows))


def _told_once(check: Check, before: Sequence[Check]) -> Check:
    """What broke an earlier promise in the same words is named, not repeated."""
    first = None if check.ok else next((other.name for other in before if not other.ok and other.detail == check.detail), None)
    return check if first is None else Check(check.name, False, f"as above: {first}")


def _run_check(name: str, check: Callable[[], str | None]) -> Check:
    try:
        with _put_back():
            return Check(name, True, check() or "")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too: the component under test must not end the suite
        return Check(name, False, _seen(error))


def _seen(error: BaseException) -> str:
    if isinstance(error, (CheckFailed, AssertionError)):
        return str(error) or "assertion failed"
    if isinstance(error, SaehubError):
        return " — ".join(part for part in (error.what, error.why, error.fix, error.said) if part)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def expect(condition: Any, seen: str) -> None:
    """Raise CheckFailed that says what was seen, unless `condition` holds."""
    if not condition:
        raise CheckFailed(seen)


@dataclass
class Subject:
    """The component under test: how to make one, and what it was registered as."""

    kind: str
    name: str
    cls: type
    config: Any
    registered: Registered | None = None
    _components: Components | None = None
    _lent: bool = False

    def make(self, config: Any = None) -> Any:
        """A fresh instance (with other settings): here, or in the plugin's worker where the registration `requires` a library, as in a run."""
        config = self.config if config is None else config
        if self.registered is None or not self.registered.component.requires:
            return self.cls(config)
        if self._components is None:
            from saehub.pipeline.components import Components

            self._components = Components()
        return self._components.make(self.registered, config)

    def close(self) -> None:
        """End the worker, if there was one of its own."""
        if self._components is not None and not self._lent:
            self._components.close()

    @property
    def config_check(self) -> Callable | None:
        """The config's `check(job)`, if it has one."""
        return getattr(self.config, "check", None)


def resolve(kind: str, component: Any, with_: Mapping[str, Any] | None = None, workers: Components | None = None) -> Subject:
    """From an address (`native/topk`), a `Registered`, or `(Class, config)`; `with_` are the settings of the first two; `workers` stay open."""
    if isinstance(component, str):
        component = catalog().find(kind, component)
    if isinstance(component, Registered):
        if component.kind != kind:
            raise UsageError(f"{component.address} is a {component.kind}, not a {kind}", fix=f"saehub.testing.check_{component.kind}")
        catalog().require(component)
        # A wrapped library is imported in its worker only; the exporters' codecs are light and are used here.
        cls = object if component.component.requires and kind != "exporter" else component.load()
        if component.component.config is None:
            return Subject(kind, component.address, cls, None, component, workers, workers is not None)
        from saehub.recipe.check import make_config

        return Subject(kind, component.address, cls, make_config(component, dict(with_ or {})), component, workers, workers is not None)
    cls, config = component
    if not (config is None or is_dataclass(config)):
        raise UsageError(f"the config of {cls.__name__} is a {type(config).__name__}", fix="a dataclass instance, or None")
    return Subject(kind, cls.__name__, cls, config)


# ---------------------------------------------------------------------- promises of every kind
def common_checks(subject: Subject) -> list[tuple[str, Callable[[], str | None]]]:
    """What every component promises, whatever its kind."""
    return [
        ("registration imports no torch", lambda: registration_is_light(subject)),
        ("settings are frozen data", lambda: config_is_frozen(subject)),
    ]


def registration_is_light(subject: Subject) -> str:
    """Import the plugin and its config in a fresh interpreter: neither torch nor a wrapped library may come along."""
    registered = subject.registered
    if registered is not None:
        modules = [_plugin_module(registered)] + ([registered.component.config.partition(":")[0]] if registered.component.config else [])
        heavy = ("torch", *registered.component.requires)
    else:
        modules, heavy = ([] if subject.config is None else [type(subject.config).__module__]), ("torch",)
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}  # a script or a test file is not on the path
    code = (
        f"import sys, importlib.util, runpy\nfor name, file in {files!r}.items():\n"
        "    try: __import__(name) if name != '__main__' else runpy.run_path(file)\n"
        "    except ModuleNotFoundError as error:\n        if not file or error.name not in (name, name.partition('.')[0]): raise\n        runpy.run_path(file)\n"
        f"print(*[m for m in {heavy!r} if m in sys.modules])"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True, timeout=120, check=False
    )
    expect(done.returncode == 0, f"importing {', '.join(modules)} failed: {done.stderr.strip().splitlines()[-1:] or ''}")
    expect(not done.stdout.strip(), f"importing {', '.join(modules)} imports {done.stdout.strip()}")
    return ", ".join(modules)


def _plugin_module(registered: Registered) -> str:
    from importlib import metadata

    for point in metadata.entry_points(group="saehub.plugins"):
        if point.name == registered.plugin and point.dist is not None and point.dist.name == registered.distribution:
            return point.module
    return registered.component.target.partition(":")[0].partition(".")[0]


def config_is_frozen(subject: Subject) -> str:
    """A config is a frozen dataclass of plain data, equal after a JSON round trip: it enters the stage key."""
    if subject.config is None:
        return "no settings"
    from dataclasses import FrozenInstanceError, asdict, fields

    from saehub.jsonio import canonical

    config = subject.config
    expect(is_dataclass(config), f"{type(config).__name__} is not a dataclass")
    expect(type(config).__dataclass_params__.frozen, f"{type(config).__name__} is not frozen")
    canonical(asdict(config))  # TypeError names what is not plain data
    for item in fields(config)[:1]:
        try:
            setattr(config, item.name, getattr(config, item.name))
        except (FrozenInstanceError, AttributeError, TypeError):
            pass
        else:
            raise CheckFailed(f"{item.name} can be assigned")
    return f"{len(fields(config))} fields"


@contextmanager
def _put_back() -> Iterator[None]:
    """Whatever happens inside, the process-wide settings of torch, numpy and Python are as before afterwards."""
    import numpy as np
    import torch

    world, states = _world(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        yield
    finally:
        torch.set_grad_enabled(world["gradient mode"])
        torch.set_default_dtype(world["the default dtype"])
        torch.set_num_threads(world["the number of threads"])
        torch.set_float32_matmul_precision(world["matmul precision"])
        torch.use_deterministic_algorithms(world["deterministic algorithms"])
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@contextmanager
def world_unchanged() -> Iterator[None]:
    """What surrounds the component is as before: random states, gradient mode, default dtype, threads, precision, folder, environment."""
    before = _world()
    yield
    after = _world()
    changed = [name for name in before if not _same(before[name], after[name])]
    expect(not changed, f"changed {', '.join(changed)}")


def _world() -> dict[str, Any]:
    import os

    import numpy as np
    import torch

    return {
        "torch's random state": torch.get_rng_state(),
        "numpy's random state": np.random.get_state()[1].copy(),
        "Python's random state": random.getstate(),
        "gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the working folder": os.getcwd(),
        "the environment": dict(os.environ),
    }


def _same(left: Any, right: Any) -> bool:
    import numpy as np
    import torch

    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return bool((left == right).all())
    return left == right


@contextmanager
def other_random_state(seed: int) -> Iterator[None]:
    """Global random states set to something else inside, and put back: what is deterministic cannot tell."""
    import numpy as np
    import torch

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str:
    """Empty when names, dtypes, shapes and bits are equal; else what differs first."""
    if set(left) != set(right):
        return f"other tensors: {sorted(set(left) ^ set(right))}"
    for name in left:
        a, b = left[name], right[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{name} is {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        if not _same_bits(a, b):
            gap = (a.double() - b.double()).abs().max().item() if a.is_floating_point() else float((a != b).sum())
            return f"{name} differs by up to {gap:.3g}"
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    from saehub.jsonio import sha256_tensor

    return sha256_tensor(a) == sha256_tensor(b)


def raises_cleanly(action: Callable[[], Any], what: str) -> str:
    """`action` must end in a SaehubError (which says what and how to fix it); returns its first line."""
    try:
        action()
    except SaehubError as error:
        return str(error).splitlines()[0]
    except BaseException as error:
        raise CheckFailed(f"{what} raised {type(error).__name__} instead of a saehub error: {error}") from error
    raise CheckFailed(f"{what} was accepted silently")


def scratch() -> tempfile.TemporaryDirectory:
    """A folder that goes away with its last reference."""
    return tempfile.TemporaryDirectory(prefix="saehub-testing-")
