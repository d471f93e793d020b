"""A run folder as the pipeline writes one, made of invented numbers: `write(folder)`; for tests of the page and of the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

from saehub.api import Measurement

T0 = 1_760_000_000.0
DATASETS = ("in_sample", "out_of_sample")
HASHES = {"in_sample": "aa" * 32, "out_of_sample": "bb" * 32}


def measurement(
    metric: str, dataset: str | None, value: float | None, stderr: float | None = None, *, sae: str = "native-k32", **more
) -> Measurement:
    """One row as native/core would write it."""
    known = {
        "evaluator": "native/core", "definition": f"saehub.{metric.partition('@')[0]}/1", "version": "0.1.0", "seed": 0, "subject_hashes": ("cc" * 32,), "site": "resid_post.2",
        "dataset": dataset, "dataset_hash": HASHES.get(dataset or ""), "n": 256, "better": "none",
    }  # fmt: skip
    if stderr is not None and value is not None:
        known |= {"ci_low": value - 1.96 * stderr, "ci_high": value + 1.96 * stderr}
    return Measurement(metric=metric, value=value, stderr=stderr, subjects=(sae,), **{**known, **more})


def histogram(centre: float, width: float = 0.7) -> dict:
    """1,280 latents, most of them near 10^centre."""
    edges = [-8 + 0.2 * i for i in range(41)]
    counts = [
        round(1240 * 0.2 / (width * math.sqrt(2 * math.pi)) * math.exp(-(((edges[i] + 0.1 - centre) / width) ** 2) / 2)) for i in range(40)
    ]
    return {"log10_edges": edges, "counts": counts, "never_fired": 17, "latents": 1280}


def measurements(sae: str = "native-k32", worse: float = 0.0) -> list[Measurement]:
    """All that native/core measures, in-sample a little better than out-of-sample."""
    rows = []
    for name, off in zip(DATASETS, (0.0, 1.0), strict=True):
        rows += [
            measurement("fvu", name, 0.1293 + 0.081 * off + worse, 0.0021 + 0.003 * off, sae=sae, better="lower"),
            measurement("explained_variance", name, 0.8712 - 0.08 * off - worse, 0.0021 + 0.003 * off, sae=sae, better="higher"),
            measurement("mse", name, 0.0417 + 0.02 * off, 0.0006, sae=sae, better="lower"),
            measurement("cosine", name, 0.9312 - 0.03 * off, 0.0009, sae=sae, better="higher"),
            measurement("l0", name, 64.0 if sae.endswith("-k64") else 32.0, 0.0, sae=sae),
            measurement("l1", name, 118.42 + 7 * off, 1.3, sae=sae),
            measurement("ce_clean", name, 3.412 + 0.2 * off, 0.031, sae=sae),
            measurement("ce_spliced", name, 3.569 + 0.31 * off, 0.033, sae=sae, better="lower"),
            measurement("ce_recovered_zero", name, 0.9634 - 0.021 * off - worse, 0.0012 + 0.001 * off, sae=sae, better="higher"),
            measurement("ce_recovered_mean", name, 0.9531 - 0.025 * off - worse, 0.0015, sae=sae, better="higher"),
            measurement("kl_spliced", name, 0.1621 + 0.09 * off, 0.0044, sae=sae, better="lower"),
            measurement("dead_share", name, None, sae=sae, better="lower", status="not_measured", reason="undecided at this budget: N = 21,345 effective tokens is below 3/r0 = 300,000 for r0 = 1e-05"),
            measurement("dead_share@1e-04", name, 0.0133, 0.0011, sae=sae, better="lower", n=32512, unit_of_n="tokens"),
            measurement("feature_density", name, 0.025, 0.0, sae=sae, parts={"histogram": histogram(-2.2 - 0.5 * off)}),
            measurement("fvu_pca", name, 0.3142 + 0.05 * off, 0.0040, sae=sae),
        ]  # fmt: skip
    rows.append(
        measurement(
            "redundancy",
            None,
            0.412,
            None,
            sae=sae,
            n=1280,
            unit_of_n="latents",
            evaluator="native/core",
            note="exact over all decoder rows",
        )
    )
    return rows


def card(saes: tuple[str, ...] = ("native-k32",)) -> dict:
    """`run_card.json` as the pipeline writes it."""
    text = {"context": 128, "bos": "sequence", "exclude": ["bos", "pad"], "template": None}

    def dataset(source: str, split: str, rows: int, digest: str) -> dict:
        return {
            "rows": rows, "n_sequences": rows // 127, "context": 128, "hash": digest, "python": "3.11.7", "tokenizer": {"hash": "dd" * 32, "name": "builtin/tiny-llama"},
            "sources": [{"source": source, "split": split, "weight": 1.0, "field": "text"}], "policy": text, "rows_wanted": rows,
        }  # fmt: skip

    def sae(name: str) -> dict:
        return {
            "architecture": "topk", "params": {"k": 32}, "d_in": 160, "d_out": 160, "d_sae": 1280, "kind": "autoencoder", "tensors_hash": "ee" * 32,
            "provenance": {"site": "resid_post.2", "target_site": None, "data": {"hash": "99" * 32, "stream_hash": "ff" * 32, "tokens_trained": 999_424}, "trainer": {"component": "native/topk", "seed": 0}},
            "checkpoint": f"checkpoints/{name}", "trainer": "native/topk", "config": {"k": 32, "expansion": 8, "lr": None}, "steps": 488, "batch": 2048, "rows": 999_424,
            "seconds": 61.3, "rows_per_second": 16304.0, "last_metrics": {"loss": 0.1302},
        }  # fmt: skip

    return {
        "schema": 1, "recipe": "topk-llama", "description": "TopK on the middle layer of the embedded tiny Llama", "written": "2025-10-09T08:55:31Z", "status": "finished", "errors": [],
        "seconds": 131.4, "store": "none", "resume": "not needed", "resume_changes": [], "warnings": [],
        "model": {"name": "builtin/tiny-llama", "revision": None, "dtype": "float32", "device": "auto", "attention": "sdpa", "fingerprint": "ab" * 32, "weight_processing": "none",
                  "shape": {"family": "llama", "n_layers": 6, "d_model": 160}},
        "data": {"train": {**dataset("builtin/python-docs", "train", 1_000_000, "99" * 32), "calibration_rows": 16384},
                 "in_sample": dataset("builtin/python-docs", "heldout", 32_768, HASHES["in_sample"]), "out_of_sample": dataset("builtin/python-code", "heldout", 32_768, HASHES["out_of_sample"])},
        "saes": {name: sae(name) for name in saes},
        "extract": {"uses": "native/hf", "sites": ["resid_post.2"], "dtype": "float32", "normalize": "sqrt_d", "lm_batch": 32},
        "exports": {f"saelens/{name}": {"outcome": "verified by the target's library", "reason": None} for name in saes},
        "environment": {"python": "3.11.7", "platform": "Linux-6.1-x86_64", "machine": "laptop", "cpus": 2, "processor": "AMD EPYC", "threads": 2, "device": "cpu", "libraries": {"saehub": "0.1.0", "torch": "2.15.0"}},
        "stages": {"tokens/train": {"key": "12" * 32, "status": "cached", "seconds": 3.0}, **{f"train/{name}": {"key": "34" * 32, "status": "finished", "seconds": 61.3} for name in saes}},
    }  # fmt: skip


def events(saes: tuple[str, ...], steps: int = 488) -> list[dict]:
    """The stream of a run of two trainings at once."""
    rows = [{"kind": "run_started", "stage": None, "t": T0, "data": {"recipe": "topk-llama"}}]
    rows += [{"kind": "stage_started", "stage": f"train/{name}", "t": T0 + 1, "data": {}} for name in saes]
    for step in range(4, steps + 1, 4):
        for i, name in enumerate(saes):
            fvu = 0.13 + 0.02 * i + 0.8 * math.exp(-step / 50) + 0.01 * math.sin(step * (i + 1.3))
            metrics = {
                "loss": fvu * 1.03,
                "fvu": fvu,
                "l0": 32.0 * (1 + i),
                "dead": 0.3 * math.exp(-step / 90),
                "lr": 4e-4 * min(1.0, step / 25, (steps - step) / 98 + 0.01),
            }
            rows.append(
                {
                    "kind": "progress",
                    "stage": f"train/{name}",
                    "t": T0 + 1 + step / 8,
                    "data": {"done": step, "total": steps, "unit": "steps", "rows": step * 2048, "metrics": metrics},
                }
            )
    rows += [{"kind": "stage_finished", "stage": f"train/{name}", "t": T0 + 62, "data": {"seconds": 61.3}} for name in saes]
    return [*rows, {"kind": "run_finished", "stage": None, "t": T0 + 131.4, "data": {"seconds": 131.4}}]


def write(folder: Path, saes: tuple[str, ...] = ("native-k32",), *, worse: float = 0.0, rows: list[Measurement] | None = None) -> Path:
    """A finished run at `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = [row for i, name in enumerate(saes) for row in measurements(name, worse + 0.02 * i)] if rows is None else rows
    dump(folder / "results.json", {"schema": 1, "measurements": [row.to_json() for row in found]})
    dump(folder / "run_card.json", card(saes))
    stages = {"tokens/train": ("tokens", "12" * 32), **{f"train/{name}": ("train", "34" * 32) for name in saes}}
    lock = {
        "schema": 1,
        "recipe": {"saehub": 1, "name": "topk-llama"},
        "stages": {name: {"kind": kind, "key": key, "where": f"store/{kind}/{key[:20]}"} for name, (kind, key) in stages.items()},
    }
    dump(folder / "recipe.lock", lock)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events(saes)), encoding="utf-8")
    for name in saes:
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        dump(
            checkpoint / "saehub.json",
            {"format_version": 1, "architecture": "topk", "params": {"k": 32}, "probe": {"rows": 256, "sha256": "77" * 32, "tokens": True}},
        )
        export = folder / "exports" / "saelens" / name
        export.mkdir(parents=True)
        (export / "cfg.json").write_text("{}")
    return folder


def dump(path: Path, data: object) -> None:
    """Plain JSON."""
    path.write_text(json.dumps(data), encoding="utf-8")
