"""A run's context and its finished stages in; the facts of its run card as JSON out (what is unknown is said to be)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from saehub.errors import SaehubError
from saehub.pipeline.cautions import grouped
from saehub.pipeline.environment import peak_resident
from saehub.pipeline.keys import plain_config

if TYPE_CHECKING:
    from saehub.api import Measurement
    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Stage


def run_card(context: Context, done: list[Stage], seconds: float, errors: list[SaehubError], measurements: Iterable[Measurement] = ()) -> dict[str, Any]:
    """Model, data, stream, training, environment, cache and resume facts of one run; numbers measured by evaluators are in results.json."""
    from saehub.recipe import to_plain
    from saehub.report.verdicts import verdicts

    plan = context.plan
    manifests = {stage.id: plan.store.manifest(stage.kind, stage.key) for stage in done}
    finished = {stage.id for stage in done}
    return {
        "schema": 1,
        "recipe": plan.recipe.name,
        "description": plan.recipe.description,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": "failed" if errors else "finished",
        "errors": [error.to_json() for error in errors],
        "seconds": round(seconds, 1),
        "model": {**asdict(plan.model), "fingerprint": plan.fingerprint, "shape": asdict(plan.shape), "weight_processing": "none"}
        if plan.model and plan.shape
        else None,
        "data": {stage.spec["name"]: _dataset(manifests[stage.id], stage) for stage in done if stage.kind == "tokens"},
        "saes": {stage.id.partition("/")[2]: _sae(stage, manifests[stage.id]) for stage in done if stage.kind in ("train", "load")},
        "verdicts": {verdict.sae: verdict.to_json() for verdict in verdicts(measurements)},
        "exports": {
            stage.id.partition("/")[2]: {"outcome": manifests[stage.id].get("outcome"), "reason": manifests[stage.id].get("reason")}
            for stage in done
            if stage.kind == "export"
        },
        "extract": {name: value for name, value in to_plain(plan.recipe)["extract"].items()},
        "store": plan.totals.get("store"),
        "environment": context.environment,
        "peak_memory": peak_memory(context.device),
        "stages": {
            stage.id: {
                "key": stage.key,
                "status": "cached" if stage.cached else "finished" if stage.id in finished else "not finished",
                "environment": manifests.get(stage.id, {}).get("environment"),
                "seconds": manifests.get(stage.id, {}).get("seconds"),
            }
            for stage in plan.stages
        },
        "preflight": context.facts.get("preflight", []),
        "resume": context.facts["resume"],
        "resume_changes": context.facts.get("resume_changes", []),
        "warnings": [*plan.warnings, *grouped({name.partition("/")[2]: manifest.get("cautions", ()) for name, manifest in manifests.items()})],
    }


def _dataset(manifest: dict[str, Any], stage: Stage) -> dict[str, Any]:
    return {**manifest.get("dataset", {}), "rows_wanted": stage.spec["rows"], "sources": [asdict(entry) for entry in stage.spec["mix"]], "policy": stage.spec["policy"]}


def _sae(stage: Stage, manifest: dict[str, Any]) -> dict[str, Any]:
    from saehub.checkpoint.format import read_header

    header = read_header(stage.where / "checkpoint")
    card = {name: header[name] for name in ("architecture", "params", "d_in", "d_out", "d_sae", "kind", "tensors_hash", "hash", "provenance") if name in header}
    card["checkpoint"] = f"checkpoints/{stage.id.partition('/')[2]}"
    if stage.kind == "train":
        seconds, rows = manifest.get("seconds") or 0.0, manifest.get("rows") or 0
        card |= {
            "trainer": stage.component,
            "config": plain_config(stage.spec["config"]),
            "steps": stage.detail["steps"],
            "batch": stage.detail["batch"],
            "rows": rows,
            "seconds": seconds,
            "rows_per_second": rows / seconds if seconds else None,
            "last_metrics": manifest.get("metrics"),
            "early": manifest.get("early", []),
        }
    return card


def peak_memory(device: str) -> int | None:
    """Bytes: of the GPU where there is one, else the largest resident size of this process so far; None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
