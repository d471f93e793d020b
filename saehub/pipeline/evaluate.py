"""Evaluation stages in; Measurement rows in the store out: stages of one evaluator run together, and each SAE's rows are kept under its own key."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import Measurement
from saehub.errors import Interrupted, StageFailed
from saehub.jsonio import read_json, write_json_atomic
from saehub.pipeline.evaluation import measurement, open_context

if TYPE_CHECKING:
    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Plan, Stage


def evaluate_stages(context: Context, stages: list[Stage]) -> None:
    """Run all pending stages of one evaluator entry in one call, and store each stage's rows."""
    plan = context.plan
    first = stages[0]
    registered = plan.catalog.find("evaluator", first.component)
    needs = set(registered.component.needs)
    started = time.monotonic()
    for stage in stages:
        context.events("stage_started", stage.id, detail=stage.detail)

    def emit(event: dict) -> None:
        if context.stop.is_set():
            raise Interrupted("stopped while evaluating", fix="the same command goes on; finished stages are kept")
        done = event.get("progress", 0.0)
        context.events("progress", first.id, done=round(100 * done), total=100, unit="%", metrics={}, text=event.get("text", ""))

    spec = evaluation_spec(context, stages, needs)
    evaluator = context.components.make(registered, first.spec["config"])
    local = not registered.component.requires
    request = open_context(
        spec,
        model=context.model if local and "model" in needs else None,
        extractor=context.extractor if local and "tokens" in needs else None,
        emit=emit,
    )
    rows = [replace(row, version=row.version or registered.version) for row in rows_of(evaluator.evaluate(request), registered.address)]
    _check_rows(rows, registered.address, [subject.id for subject in request.subjects])
    seconds = time.monotonic() - started
    for stage in stages:
        ids = {subject.partition("/")[2] for subject in stage.spec["subjects"]}
        own = [row for row in rows if set(row.subjects) <= ids or not row.subjects]
        if not own:
            raise StageFailed(f"{registered.address} returned no measurement for {', '.join(sorted(ids))}", where=stage.id)
        with plan.store.create("evaluate", stage.key, context.manifest(stage, seconds=seconds)) as folder:
            write_json_atomic(folder / "measurements.json", {"schema": 1, "measurements": [row.to_json() for row in own]})
        context.events("stage_finished", stage.id, seconds=seconds, path=str(stage.where))


def evaluation_spec(context: Context, stages: list[Stage], needs: set[str]) -> dict[str, Any]:
    """What `open_context` needs, for the SAEs of `stages`."""
    plan = context.plan
    extract = plan.recipe.extract
    subjects = {subject: plan.stage(subject) for stage in stages for subject in stage.spec["subjects"]}
    datasets = [stage for stage in plan.of("tokens") if stage.spec["name"] != "train"] if needs & {"tokens", "sequences"} else []
    return {
        "subjects": [subject_spec(name.partition("/")[2], stage.where / "checkpoint", stage.detail.get("site")) for name, stage in subjects.items()],
        "model": asdict(plan.model) if plan.model and "model" in needs else None,
        "datasets": {stage.spec["name"]: str(stage.where / "tokens") for stage in datasets},
        "extractor": {"address": plan.catalog.find("extractor", extract.uses).address, "config": dict(extract.with_)},
        "seed": stages[0].spec["seed"],
        "device": context.device,
        "work_dir": str(plan.base / "work" / stages[0].key[:20]),
        "lm_batch": extract.lm_batch,
        "measured": [row.to_json() for row in _measured(plan, stages)] if "measurements" in needs else [],
        "cautions": _cautions(context, subjects) if "measurements" in needs else {},
    }


def _measured(plan: Plan, stages: list[Stage]) -> list[Measurement]:
    """The rows of the evaluations that `stages` depend on, each once."""
    sources = dict.fromkeys(name for stage in stages for name in stage.inputs if name.startswith("evaluate/"))
    return [row for name in sources for row in read_measurements(plan.stage(name).where)]


def _cautions(context: Context, subjects: Iterable[str]) -> dict[str, list[str]]:
    """What preflight warns of, by SAE: its checks of one SAE are named `ID: what`."""
    warned = [check for check in context.facts.get("preflight", []) if check["status"] == "warning"]
    ids = [subject.partition("/")[2] for subject in subjects]
    return {name: told for name in ids if (told := [check["detail"] for check in warned if check["name"].startswith(f"{name}: ")])}


def subject_spec(name: str, path: Path, site: str | None = None) -> dict[str, Any]:
    """One SAE by path; the site is the recipe's, else the checkpoint's own."""
    from saehub.checkpoint.format import read_header

    header = read_header(path)
    known = header.get("provenance", header)
    return {"id": name, "path": str(path), "site": site or known.get("site"), "target_site": known.get("target_site")}


def rows_of(returned: Any, address: str) -> list[Measurement]:
    """What an evaluator's `evaluate` gave; StageFailed unless that is Measurement rows."""
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, Mapping)):
        what = "nothing (None)" if returned is None else f"a {type(returned).__name__}"
        raise StageFailed(f"evaluate of {address} returned {what}", fix="it returns a list of saehub.Measurement rows, or yields them")
    rows = list(returned)
    strange = next((row for row in rows if not isinstance(row, Measurement)), None)
    if strange is not None:
        raise StageFailed(f"evaluate of {address} returned a {type(strange).__name__} among its rows", fix="every row is a saehub.Measurement")
    for row in rows:
        if reason := row.wrong():
            raise StageFailed(f"evaluate of {address} returned a row {row.metric!r:.80} that is no measurement", why=reason, fix="see saehub.Measurement; float(…) makes a number")
    return rows


def _check_rows(rows: list[Measurement], address: str, ids: list[str]) -> None:
    for row in rows:
        foreign = set(row.subjects) - set(ids)
        if foreign:
            raise StageFailed(f"{address} measured {sorted(foreign)[0]!r}, which it was not given", where=row.metric)


def read_measurements(folder: Path) -> list[Measurement]:
    """The rows of a finished evaluation stage."""
    return [measurement(data) for data in read_json(Path(folder) / "measurements.json")["measurements"]]
