"""The README's main run in; its time, its results and dictionary_learning's TopK trained on the very same batches out, as a table and JSON.

    python tests/benchmarks/main_run.py [--lrs 1,4] [--set a.b=v]... [--json FILE]

Both dictionaries see the same rows in the same order and batches; dictionary_learning gets them as it normalises them itself (divided by
the root of their mean squared norm). FVU is pooled over the held-out rows of each dataset: Σ|x − x̂|² / Σ|x − x̄|².
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

import saehub
from saehub.activations.batches import Batcher
from saehub.checkpoint.format import load
from saehub.pipeline.context import Context
from saehub.pipeline.events import Events
from saehub.pipeline.plan import make_plan
from saehub.pipeline.stream import HubStream
from saehub.plugins import catalog
from saehub.recipe import resolve
from saehub.seeds import derive

RECIPE, SAE = "topk-llama", "native-k32"


def fvu(reconstruct, x_ND: torch.Tensor) -> float:
    """Fraction of variance unexplained, pooled over rows, in float64."""
    error, mean = 0.0, x_ND.double().mean(0)
    for chunk in x_ND.split(4096):
        error += float((chunk.double() - reconstruct(chunk).double()).square().sum())
    return error / float((x_ND.double() - mean).square().sum())


def batches(context: Context, site: str, batch: int):
    """The batches that the native trainer got, in raw units."""
    with HubStream(context, [site], derive("stream", context.plan.recipe.seed)) as stream:
        batcher = Batcher(batch)
        for index in range(stream.n_blocks):
            yield from (rows["x"].float() for rows in batcher.feed({"x": stream.block(index).acts[site]}))


def dictionary_learning(context: Context, stage, lr_factor: float):
    """dictionary_learning's TopKTrainer at `lr_factor` times its default rate (None there: 2e-4 / sqrt(F / 2^14)), its other defaults kept."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    job, config = stage.spec["job"], stage.spec["config"]
    width = config.d_sae(job)
    lr = lr_factor * 2e-4 / (width / 2**14) ** 0.5
    trainer = TopKTrainer(
        steps=job.steps, activation_dim=job.d_in, dict_size=width, k=config.k, layer=0, lm_name="any", device="cpu", seed=0, lr=lr,
        warmup_steps=min(1000, job.steps // 10), threshold_start_step=job.steps // 2, decay_start=int(0.8 * job.steps),
    )  # fmt: skip
    norm, started = None, time.monotonic()
    for step, x_BD in enumerate(batches(context, job.site, job.batch)):
        norm = norm or float(x_BD.square().sum(1).mean().sqrt())
        trainer.update(step, x_BD / norm)
    ae = trainer.ae.eval()

    @torch.no_grad()
    def reconstruct(x_ND: torch.Tensor) -> torch.Tensor:
        return ae(x_ND / norm) * norm

    return reconstruct, lr, time.monotonic() - started


def held_out(context: Context, name: str, site: str) -> torch.Tensor:
    """The kept rows of an evaluation dataset."""
    session = context.open_extractor(context.tokens(name), [site])
    rows = [(batch := session.rows(i)).acts[site][batch.keep_N].float() for i in range(session.n_batches)]
    session.close()
    return torch.cat(rows)


def measure(lr_factors=(1.0, 4.0), overrides=(), home: Path | None = None) -> dict:
    """Run the recipe, train the peer, and compare."""
    if home is not None:
        os.environ["SAEHUB_HOME"] = str(home)
    started = time.monotonic()
    result = saehub.run(RECIPE, set=list(overrides))
    seconds = time.monotonic() - started
    found = {(row.metric, row.dataset): row for row in result.measurements if row.subjects == (SAE,)}
    sae = load(result.checkpoints[SAE])
    context = Context(make_plan(resolve(RECIPE, list(overrides), catalog()), catalog()), Events())
    stage = context.plan.stage(f"train/{SAE}")
    site = stage.spec["job"].site
    data = {name: held_out(context, name, site) for name in ("in_sample", "out_of_sample")}
    table = {"saehub native/topk": {"lr": None, "seconds": None, **{name: fvu(sae, x) for name, x in data.items()}}}
    for factor in lr_factors:
        reconstruct, lr, took = dictionary_learning(context, stage, factor)
        row = {"lr": lr, "seconds": took, **{name: fvu(reconstruct, x) for name, x in data.items()}}
        table[f"dictionary_learning TopK, {factor:g} x its default lr"] = row
    peer = min(row["in_sample"] for name, row in table.items() if name.startswith("dictionary"))
    return {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "measured": {f"{metric} {dataset}": row.value for (metric, dataset), row in found.items() if row.value is not None},
        "table": table,
        "fvu_over_best_peer": table["saehub native/topk"]["in_sample"] / peer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lrs", default="1,4", help="multiples of dictionary_learning's default learning rate")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure([float(word) for word in options.lrs.split(",")], options.set)
    print(f"saehub recipe run {RECIPE}: {found['seconds']:.0f} s on {found['threads']} threads")
    for name, value in found["measured"].items():
        print(f"  {name:50s} {value:.4g}")
    for name, row in found["table"].items():
        print(f"{name:50s} FVU in-sample {row['in_sample']:.4f}  out-of-sample {row['out_of_sample']:.4f}" + (f"  {row['seconds']:.0f} s" if row["seconds"] else ""))
    print(f"FVU over the best peer's: {found['fvu_over_best_peer']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
