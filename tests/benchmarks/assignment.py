"""Widths in; time (wall, and of the processor), peak memory, total and certified gap of matching two dictionaries of that width out, beside scipy's dense solver where it fits.

    python tests/benchmarks/assignment.py --latents 2048,4096,8192 --width 768 --dense 8192
    python tests/benchmarks/assignment.py --latents 32768 --width 768 --gap 1e-3
    python tests/benchmarks/assignment.py --latents 131072 --width 768 --gap 1e-3 --kinds shared

Dictionaries: `shared` (half of the latents are in both, with noise of half their length; the others are unrelated), `random` (none is
shared) and `clusters` (every latent has about twenty near-duplicates).
"""

from __future__ import annotations

import argparse
import platform
import time

import torch
from scipy.optimize import linear_sum_assignment

from saehub.pipeline.environment import peak_resident
from saehub_native.evaluate.matching.assignment import assign, unit


def dictionaries(kind: str, latents: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of them, float32 [latents, width]."""
    draw = torch.Generator().manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, width, generator=draw)

    if kind == "clusters":
        centres = normal(max(1, latents // 20))
        a, b = (centres[torch.randint(0, len(centres), (latents,), generator=draw)] + 0.05 * normal(latents) for _ in range(2))
        return a, b
    a, b = normal(latents), normal(latents)
    if kind == "shared":
        half = latents // 2
        b[:half] = a[:half] + 0.5 * normal(half)
    return a, b[torch.randperm(latents, generator=draw)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--latents", default="2048,8192")
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--kinds", default="shared,random,clusters")
    options.add_argument("--gap", type=float, default=0.0)
    options.add_argument("--seconds", type=float)
    options.add_argument("--dense", type=int, default=0, help="beside it, scipy's dense solver up to this many latents")
    options.add_argument("--talk", action="store_true")
    given = options.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {given.width} dimensions; gap asked for {given.gap:g}")
    for latents in map(int, given.latents.split(",")):
        for kind in given.kinds.split(","):
            a, b = dictionaries(kind, latents, given.width)
            tell = (lambda text: print(f"    {time.process_time():7.0f} s", text, flush=True)) if given.talk else (lambda text: None)
            begun = time.process_time()
            found = assign(a, b, gap=given.gap, seconds=given.seconds, tell=tell)
            worked = time.process_time() - begun
            line = (
                f"{latents:>7,} {kind:<8}  mean cosine {found.total / latents:.5f}  gap {100 * found.gap:.2g} %  {found.seconds:7.1f} s (processor {worked:.1f} s)"
                f"  {found.passes} passes  {found.edges:,} edges  peak {peak_resident() / 2**30:.1f} GiB"
            )
            if latents <= given.dense:
                begun, worked = time.monotonic(), time.process_time()
                s = (unit(a.double()) @ unit(b.double()).T).numpy()
                rows, cols = linear_sum_assignment(s, maximize=True)
                line += f"  scipy {time.monotonic() - begun:.1f} s (processor {time.process_time() - worked:.1f} s), total differs by {s[rows, cols].sum() - found.total:.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
