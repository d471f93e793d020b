"""Seeds in; the FVU that TopK reaches with 8-bit and with 32-bit moments of Adam, trained alike in plain torch, and their ratio, out.

    python tests/benchmarks/adam_bits.py [--seeds 12] [--steps 400]

Per seed both trainings have the same rows, order, start and settings. FVU = Σ|x̂−x|² / Σ|x−x̄|² on rows that neither has seen.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ["SAEHUB_KERNELS"] = "reference"
import torch

from saehub.api import Job
from saehub_native.config import TopKConfig
from saehub_native.train import NativeTrainer
from topk_quality import planted

D, LATENTS, K, BATCH = 64, 512, 12, 512


def fvu(bits: int, seed: int, steps: int, start_ND: torch.Tensor, x_ND: torch.Tensor, fresh_ND: torch.Tensor) -> float:
    """Start from calibration rows, train, and measure on fresh rows."""
    config = TopKConfig(k=K, width=LATENTS, batch=BATCH, adam_bits=bits)
    job = Job("adam", "resid_post.0", None, D, D, steps, BATCH, steps * BATCH, seed, device="cpu")
    session = NativeTrainer(config).open(job, lambda n: (start_ND[:n], None))
    for rows in x_ND.split(BATCH):
        session.step(rows)
    with torch.no_grad():
        error = session.finish()(fresh_ND) - fresh_ND
    return float(error.square().sum() / (fresh_ND - fresh_ND.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"TopK, d {D}, {LATENTS} latents, k {K}, {args.steps} steps of {BATCH} rows; torch {torch.__version__}")
    ratios = []
    for seed in range(args.seeds):
        x_ND = torch.cat(list(planted(args.steps * BATCH + 8192, d=D, n_true=768, l0=10, seed=seed)))
        found = {bits: fvu(bits, seed, args.steps, x_ND[:4096], x_ND[8192:], x_ND[4096:8192]) for bits in (8, 32)}
        ratios.append(found[8] / found[32])
        print(f"seed {seed:>2}: FVU {found[8]:.5f} with 8 bits, {found[32]:.5f} with 32: ratio {ratios[-1]:.4f}", flush=True)
    if len(ratios) > 1:
        print(f"mean ratio {statistics.mean(ratios):.4f} ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.4f} (standard error over seeds)")


if __name__ == "__main__":
    main()
