"""Things to time in; medians with p10 and p90, ratios within rounds, and a record of command, machine and versions out: shared by the benchmarks.

Rounds are interleaved A, B, C … C, B, A, so that a slow spell of the machine meets everybody; ratios are of the same round, and their median
is what is quoted. The first round is dropped.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "500000000"}
"""glibc keeps freed memory: without it a large part of the time of code that allocates big tensors goes into page faults."""


def again_with(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Run this script once more under other environment variables; what it prints as JSON."""
    command = [sys.executable, sys.argv[0], *arguments, "--json"]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    """median, p10 and p90."""
    ordered = sorted(values)
    pick = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
    return {"median": statistics.median(ordered), "p10": pick(0.1), "p90": pick(0.9)}


def interleave(
    ways: Mapping[str, Callable[[int], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each way (called with the number of the turn) in each of `rounds` rounds, after one that is dropped.

    `time.process_time` as the clock counts the processor time of all threads, page faults included: on one thread it is what the wall clock
    would show on a machine without neighbours.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        order = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for name in order:
            start = clock()
            ways[name](turn)
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of each one's time over that of `base` in the same round."""
    return {name: statistics.median(a / b for a, b in zip(values, seconds[base], strict=True)) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, threads, date and versions."""
    import torch

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    family = {
        key: next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(key)), "?")
        for key in ("cpu family", "model\t")
    }
    libraries = {}
    for name in ("saehub", "torch", "numba", "numpy", "transformers", "sae-lens", "eai-sparsify", "dictionary-learning"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *(Path(sys.argv[0]).name, *sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{model}, family {family['cpu family']} model {family[chr(109) + 'odel' + chr(9)]}, {os.cpu_count()} cores",
        "instructions": [flag for flag in ("avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if flag in flags.split()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": libraries,
    }


def headline(record: Mapping[str, Any]) -> str:
    """The machine in two lines."""
    libraries = ", ".join(f"{name} {number}" for name, number in record["libraries"].items())
    return (
        f"{record['date']}, {record['processor']}, {record['threads']} threads, {' '.join(record['instructions']) or 'no low-precision instructions'}\n"
        f"Python {record['python']}, {libraries}"
    )
