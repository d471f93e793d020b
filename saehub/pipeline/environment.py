"""This process in; what is recorded beside every result, and compared before a half-done training goes on, out."""

from __future__ import annotations

import os
import platform
import sys
from functools import lru_cache
from importlib import metadata
from typing import Any

LIBRARIES = ("saehub", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets")


def describe(device: str | None = None) -> dict[str, Any]:
    """Python, platform, library versions (no import needed), and, once torch is loaded, threads and the device."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.node(),
        "cpus": os.cpu_count(),
        "processor": processor(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }
    if "torch" in sys.modules:
        import torch

        found["threads"] = torch.get_num_threads()
        found["device"] = device or "cpu"
        if device and device.startswith("cuda"):
            found["device_name"] = torch.cuda.get_device_name(device)
    return found


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's own name, such as `AMD EPYC`; where the system does not say, its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as known:
            named = next((line.partition(":")[2].strip() for line in known if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named or platform.processor() or platform.machine()


@lru_cache(maxsize=len(LIBRARIES))
def _version(name: str) -> str | None:
    # Of this process, which keeps what it has imported: every saved state records it, and reading metadata takes milliseconds.
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def same_place(recorded: dict[str, Any]) -> bool:
    """Whether a result was made under the versions of today (`--strict-cache`)."""
    return recorded.get("libraries") == describe()["libraries"]


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs and can change the last bits: `threads: 2 -> 4`."""
    names = ("platform", "python", "threads", "processor", "device", "device_name")
    recorded = {"processor": now.get("processor"), **recorded}  # what was written before processors were
    found = [f"{name}: {recorded.get(name)} -> {now.get(name)}" for name in names if recorded.get(name) != now.get(name)]
    before, after = recorded.get("libraries", {}), now.get("libraries", {})
    return found + [f"{name}: {before.get(name)} -> {after.get(name)}" for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def peak_resident() -> int | None:
    """Bytes: the largest resident size of this process so far; None where the system does not say.

    Linux's `VmHWM` begins anew with every program, whereas `ru_maxrss` is inherited: a small program started by a large one would report
    the large one's peak.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
