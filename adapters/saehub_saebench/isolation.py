"""A block of SAEBench's code in; the same block run in a private folder, with everything global put back after it, out."""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import numpy as np
import torch

from saehub.jsonio import hash_json


@contextmanager
def untouched_world() -> Iterator[None]:
    """Put back what SAEBench changes and never restores: grad mode, random states, the folder, environment variables, dtype,
    threads; its run-time type checks are off inside, and what is first imported there draws nothing."""
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    states = random_states()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    folder, environment = Path.cwd(), dict(os.environ)
    precision = torch.get_float32_matmul_precision()
    types = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # they refuse a TransformerBridge, and crash under beartype >= 0.18
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # thousands, about scikit-learn's and pydantic's next versions
            with imports_draw_nothing():
                yield
    finally:
        os.chdir(folder)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        jaxtyping.config.update("jaxtyping_disable", types)
        put_back(states)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


def random_states() -> tuple[Any, Any, torch.Tensor]:
    """Python's, NumPy's and torch's (CPU) global random states."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  SAEBench draws from the global ones


def put_back(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Make `random_states()` what it was."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@contextmanager
def imports_draw_nothing() -> Iterator[None]:
    """A module that is imported in the block leaves the global random states as it found them.

    SAEBench is imported inside functions, so much of it comes first after a seed was set; and `rich.style`, which scikit-learn 1.9 brings in,
    draws from Python's generator when it is imported: absorption's words would depend on what else the process had measured before.
    Threads that draw while another one imports would be set back; SAEBench's do not.
    """
    finder = _QuietFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _QuietFinder:
    """Finds what the other finders find; what comes from a file is executed between a look at the random states and their return."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, _QuietFinder) and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader | ExtensionFileLoader):  # objects made for this module alone
            spec.loader.exec_module = partial(_quietly, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _quietly(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    states = random_states()
    try:
        execute(module)
    finally:
        put_back(states)


@contextmanager
def private_folder(base: Path, **identity: Any) -> Iterator[Path]:
    """A new empty working folder below `base`, named by the hash of `identity` (tensor hash, settings, seed …), gone afterwards.

    SAEBench and sae-probes skip work whose result file exists, and know an SAE by its name alone. Here no file of another SAE, setting or
    seed can exist: the name holds what decides the result, and whatever a killed run left is removed first.
    """
    folder = Path(base).absolute() / hash_json(identity)[:32]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Other values for some names of a module, for as long as the block runs: what SAEBench takes from a constant where no argument is offered."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random states: several of SAEBench's evals never do."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    torch.set_grad_enabled(True)
