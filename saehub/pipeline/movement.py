"""The state of a training session at its first step and now in; how far its matrices have moved, as a share of their norm, out.

    moved = max over matrices W of ‖W - W₀‖ / ‖W₀‖,  Frobenius, on an even sample of the entries

A dictionary that has not moved is its initial state, whatever it reconstructs: one that starts at directions of the data explains much of
it untrained. What starts at zero (moments of an optimizer, biases) and what is no matrix is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saehub.pipeline.workspace import disk_errors

if TYPE_CHECKING:
    from torch import Tensor

FILE = "start.safetensors"
SAMPLE = 65_536
"""Entries of a matrix that are looked at."""
UNMOVED = 0.01
"""Share of its norm below which a matrix is still where it began: directions have turned by less than 0.6 degrees."""


def sketch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 [≤ 2 · SAMPLE] of every matrix that is not zero, by name."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            flat_N = tensor.detach().reshape(-1)
            sample_N = flat_N[:: max(1, flat_N.numel() // SAMPLE) | 1].float().cpu().clone()  # odd: no column is met again and again
            if bool(sample_N.any()):
                found[name] = sample_N
    return found


def moved(start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float | None:
    """The largest relative change between two sketches, to three digits; None where they share no matrix."""
    shares = [
        float((now[name].double() - start_N.double()).norm() / start_N.double().norm())
        for name, start_N in start.items()
        if name in now and now[name].shape == start_N.shape
    ]
    return float(f"{max(shares):.3g}") if shares else None


def write(start: Mapping[str, Tensor], folder: Path) -> None:
    """Keep the sketch of the first step beside the states, for trainings that are interrupted."""
    from safetensors.torch import save_file

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{FILE}.{os.getpid()}"
        save_file(dict(start), scratch)
        os.replace(scratch, folder / FILE)


def read(folder: Path) -> dict[str, Tensor]:
    """The sketch that `write` kept; empty where there is none that can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / FILE)
    except (OSError, SafetensorError):
        return {}
