"""Sizes in; bytes of memory and disk that a plan will need out, so that what cannot fit is refused before work starts."""

from __future__ import annotations

from pathlib import Path

from saehub.api import Job, ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def model_bytes(shape: ModelShape, dtype: str) -> int:
    """Weights of a gated-MLP transformer: 2 V d + L (4 d h + 3 d m), an upper bound for the families we name."""
    attention = 4 * shape.d_model * shape.n_heads * shape.d_head
    mlp = 3 * shape.d_model * shape.d_mlp
    return (2 * shape.vocab * shape.d_model + shape.n_layers * (attention + mlp)) * BYTES[dtype]


def sae_bytes(job: Job, d_sae: int) -> int:
    """Training one SAE: encoder and decoder in float32, with gradient-free Adam's two moments (12 bytes a weight)."""
    return (job.d_in + job.d_out) * d_sae * 12


def block_bytes(rows: int, widths: list[int], stream_dtype: str) -> int:
    """One block in memory: raw and permuted copies of every site."""
    return 2 * rows * sum(widths) * BYTES[stream_dtype]


def human(size: float) -> str:
    """`1.5 GB` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def available_memory(device: str) -> int:
    """Bytes of memory free for work on `device` (auto: a GPU if there is one)."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.mem_get_info(device if ":" in device else None)[0]
    return host_memory()


def host_memory() -> int:
    """Bytes of main memory free for work: what the system says, or less where a control group (a container) limits it. Needs no torch."""
    try:
        pages = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/meminfo", encoding="ascii") if ":" in line}  # noqa: SIM115
        free = pages["MemAvailable"] * 1024
    except (OSError, KeyError):
        return 8_000_000_000
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        cache = next(int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file "))
        return max(0, min(free, limit - used + cache))
    except (OSError, ValueError, StopIteration):  # no group, or no limit ("max")
        return free
