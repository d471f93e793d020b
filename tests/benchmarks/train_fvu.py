"""FVU on held-out rows after equal training in, on the fast path and in plain torch, every architecture; their mean difference and its error out.

    python tests/benchmarks/train_fvu.py [--only gated] [--error 0.1] [--seeds 48] [--json]

One run says little: a rounding that decides one near-tie changes which latents learn, and moves the plain path's own FVU by up to a percent. So each
seed trains four times, plain and fast, on the rows and on rows whose numbers are moved by up to four units of their last place, each for itself (one
factor for all would not do: training follows it, decisions and all). The difference of a seed is that of the two means of ln FVU. There are as
many seeds as bring its standard error below `--error` percent, which does not look at the mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys

import interleaved
import torch
from torch import Tensor
from train_step import rows_like_activations

D, LATENTS, K, BATCH, STEPS = 32, 512, 8, 512, 200
LEAST_SEEDS = 8
ARCHITECTURES = {
    "topk": ("config:TopKConfig", {"k": K}),
    "batchtopk": ("config:BatchTopKConfig", {"k": K}),
    "matryoshka_batchtopk": ("config:MatryoshkaConfig", {"k": K}),
    "abstopk": ("config:AbsTopKConfig", {"k": K}),
    "groupmax": ("config:GroupMaxConfig", {"k": K}),
    "jumprelu, tanh": ("config_dense:JumpReLUConfig", {"target_l0": float(K)}),
    "jumprelu, l0": ("config_dense:JumpReLUConfig", {"target_l0": float(K), "penalty": "l0"}),
    "relu": ("config_dense:ReLUConfig", {"target_l0": float(K)}),
    "gated": ("config_dense:GatedConfig", {"target_l0": float(K)}),
}


def moved(x_ND: Tensor, seed: int) -> Tensor:
    """x (1 + 2⁻²³ r) with r drawn from −4 … 4 for each number."""
    draw = torch.Generator().manual_seed(seed)
    return x_ND * (1 + 2.0**-23 * torch.randint(-4, 5, x_ND.shape, generator=draw))


def trained(name: str, kernels: str, seed: int, calibration_ND: Tensor, train_ND: Tensor, held_ND: Tensor) -> tuple[float, float]:
    """FVU on held-out rows of one training, and the share of latents dead at its end."""
    from importlib import import_module

    from saehub.api import Job
    from saehub_native.train import NativeTrainer

    os.environ["SAEHUB_KERNELS"] = kernels
    where, settings = ARCHITECTURES[name]
    module, _, word = where.partition(":")
    config = getattr(import_module(f"saehub_native.{module}"), word)(width=LATENTS, batch=BATCH, **settings)
    job = Job("fvu", "resid_post.0", None, D, D, STEPS, BATCH, STEPS * BATCH, seed)
    session = NativeTrainer(config).open(job, lambda n: (calibration_ND[:n], None))
    for step in range(STEPS):
        session.step(train_ND[step * BATCH : (step + 1) * BATCH])
    sae = session.finish()
    error_ND = (sae(held_ND) - held_ND).double()
    return float(error_ND.square().sum() / (held_ND - held_ND.mean(0)).double().square().sum()), session.metrics()["dead"]


def compare(name: str, error: float, seeds: int, rows: tuple[Tensor, Tensor, Tensor]) -> dict:
    """The difference of the two paths, its standard error, and how far the plain one differs from itself."""
    calibration_ND, train_ND, held_ND = rows
    differences, own, plain, dead = [], [], [], []
    for seed in range(seeds):
        found = {}
        for kernels in ("reference", "cpu"):
            for moves, x_ND in (("none", train_ND), ("last bits", moved(train_ND, seed))):
                fvu, dead_share = trained(name, kernels, seed, calibration_ND, x_ND, held_ND)
                found[kernels, moves] = math.log(fvu)
                dead.append(dead_share)
        values = {kernels: [found[kernels, moves] for moves in ("none", "last bits")] for kernels in ("reference", "cpu")}
        differences.append(statistics.mean(values["cpu"]) - statistics.mean(values["reference"]))
        own.append(values["reference"][1] - values["reference"][0])
        plain.append(math.exp(statistics.mean(values["reference"])))
        if seed + 1 >= LEAST_SEEDS and statistics.stdev(differences) / math.sqrt(seed + 1) <= error:
            break
    return {
        "fvu": statistics.mean(plain),
        "difference": statistics.mean(differences),
        "error": statistics.stdev(differences) / math.sqrt(len(differences)),
        "own": math.sqrt(statistics.mean(value**2 for value in own)),
        "seeds": len(differences),
        "dead": statistics.mean(dead),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=ARCHITECTURES, action="append", help="may be given several times; else all")
    parser.add_argument("--error", type=float, default=0.1, help="percent")
    parser.add_argument("--seeds", type=int, default=48, help="at most")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows_ND = torch.cat(rows_like_activations(BATCH, D, STEPS + 16, n_true=512, l0=8))
    rows = rows_ND[: 8 * BATCH], rows_ND[16 * BATCH :], rows_ND[8 * BATCH : 16 * BATCH]
    found = {}
    for name in options.only or ARCHITECTURES:
        found[name] = compare(name, options.error / 100, options.seeds, rows)
        print(name, found[name], file=sys.stderr, flush=True)
    from saehub_native.kernels.rank import best_kind

    record = {**interleaved.machine(), "ranking": best_kind(), "fvu": found}
    lines = [
        interleaved.headline(record),
        f"d {D}, {LATENTS} latents, L0 {K}, batch {BATCH}, {STEPS} steps; the fast path ranks in {record['ranking']}",
        f"{'':22s}{'FVU, plain':>10s}{'fast − plain':>20s}{'plain − itself, moved':>24s}{'seeds':>7s}{'dead':>7s}",
    ]
    for name, row in found.items():
        lines.append(
            f"{name:22s}{row['fvu']:10.4f}{row['difference']:+12.2%} ± {row['error']:.2%}{row['own']:>24.2%}{row['seeds']:7d}{row['dead']:7.0%}"
        )
    print(json.dumps(record) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
