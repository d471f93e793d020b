"""A training session between two batches in; a state on disk that survives kill -9 at any instant, and the session back, out."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError
from saehub.jsonio import read_json, sha256_file, write_json_atomic
from saehub.pipeline.workspace import disk_errors

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2  # the newest states; the older one is the way back from a broken disk


@dataclass
class State:
    """One job's state after `step` optimizer steps.

    The stream goes on at row `step * batch + len(carry)`: `carry` holds rows already extracted and not yet used, so that no block is
    extracted twice for them.
    """

    step: int
    tensors: dict[str, Tensor]
    data: dict[str, Any]
    carry: dict[str, Tensor]
    environment: dict[str, Any]


def save_state(folder: Path, state: State) -> Path:
    """Write `step-<n>/` (tensors, then JSON with their hash, then a rename) and drop all but the newest ones."""
    from safetensors.torch import save_file

    folder = Path(folder)
    final = folder / f"step-{state.step:010d}"
    scratch = folder / f".{final.name}.{os.getpid()}"
    with disk_errors(folder):
        for wreck in folder.glob(".step-*"):  # left by a kill
            shutil.rmtree(wreck, ignore_errors=True)
        scratch.mkdir(parents=True)
        tensors = {f"state/{name}": tensor for name, tensor in state.tensors.items()} | {f"carry/{name}": t for name, t in state.carry.items()}
        file = scratch / "state.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        _flush(file)
        facts = {"schema": 1, "step": state.step, "data": state.data, "environment": state.environment, "sha256": sha256_file(file)}
        write_json_atomic(scratch / "state.json", facts)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(scratch, final)
        _flush(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(folder: Path) -> tuple[State | None, list[str]]:
    """The newest whole state, or None; and a sentence for each one that was broken and passed over."""
    from safetensors.torch import load_file

    skipped: list[str] = []
    for path in sorted(Path(folder).glob("step-*"), reverse=True):
        try:
            facts, file = read_json(path / "state.json"), path / "state.safetensors"
            if sha256_file(file) != facts["sha256"]:
                raise FormatError(f"{file} does not have the content that was written")
            tensors = load_file(file)
            return State(
                facts["step"],
                {name.removeprefix("state/"): tensor for name, tensor in tensors.items() if name.startswith("state/")},
                facts["data"],
                {name.removeprefix("carry/"): tensor for name, tensor in tensors.items() if name.startswith("carry/")},
                facts["environment"],
            ), skipped
        except (FormatError, OSError, KeyError) as error:
            skipped.append(f"{path.name}: {error}")
    return None, skipped


def drop_states(folder: Path) -> None:
    """Remove a finished job's states."""
    shutil.rmtree(folder, ignore_errors=True)
