"""A plan in; its stages done in order (finished ones skipped, half-done ones continued) and a self-explaining run folder out."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from saehub.api import Measurement
from saehub.errors import FormatError, Interrupted, SaehubError, StageFailed
from saehub.jsonio import hash_json, write_json_atomic, write_text_atomic
from saehub.pipeline.context import Context, stage_error
from saehub.pipeline.early import stopped_rows
from saehub.pipeline.evaluate import evaluate_stages, read_measurements
from saehub.pipeline.events import EventLog, Events, Listener
from saehub.pipeline.plan import Plan, Stage
from saehub.pipeline.workspace import disk_error, link_or_copy


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    run_dir: Path
    """The run folder."""
    measurements: tuple[Measurement, ...]
    """Every row of results.json."""
    checkpoints: Mapping[str, Path]
    """SAE id -> checkpoint folder in the run folder."""
    seconds: float

    @property
    def results(self) -> list[dict[str, Any]]:
        """Rows as plain dicts (`pandas.DataFrame(run.results)` works); per-sequence parts are left in results.json."""
        return [{name: value for name, value in row.to_json().items() if name != "parts"} for row in self.measurements]


def run_recipe(recipe: str | Path, *, set: Mapping[str, Any] | Iterable[str] = (), out: str | Path | None = None, listeners: Iterable[Listener] = ()) -> RunResult:  # noqa: A002
    """Run a recipe by name or path: `saehub.run("topk-llama", set={"train.native-k32.with.k": 64})`."""
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.recipe import locator, resolve

    found, overrides = catalog(), set if isinstance(set, Mapping) else list(set)
    resolved = resolve(recipe, overrides, found)
    return run(make_plan(resolved, found, out=Path(out) if out else None, locate=locator(recipe, overrides, found)), listeners)


def run(plan: Plan, listeners: Iterable[Listener] = (), *, recipe_text: str | None = None, command: str | None = None) -> RunResult:
    """Do what `plan` says. Raises the first stage's error at the end; other stages' results are kept.

    `recipe_text` is the recipe as it was given, `command` the command line that goes on with this run: both are only written down.
    """
    started = time.monotonic()
    plan = _ready(plan)
    for stage in plan.stages:
        if stage.component and not stage.cached:
            registered = plan.catalog.find(_kind_of(stage), stage.component)
            plan.catalog.require(registered)
            if not registered.component.requires:  # one that lives in a worker is imported there only
                registered.load()
    _refusals(plan)
    events = Events(listeners)
    _open_run_dir(plan, recipe_text, command)
    log = EventLog(plan.run_dir / "events.jsonl")
    events.add(log)
    context = Context(plan, events)
    try:
        with _signals(context), plan.store.lock(hash_json(str(plan.run_dir)), lambda: events("log", None, text="another process runs this recipe; waiting")):
            events("run_started", None, recipe=plan.recipe.name, run_dir=str(plan.run_dir), stages=[stage.id for stage in plan.stages])
            for text in plan.warnings:
                events("warning", None, text=text)
            errors = _walk(context)
            measurements = _publish(context, time.monotonic() - started, errors)
            if errors:
                raise errors[0]
            events("run_finished", None, seconds=time.monotonic() - started, run_dir=str(plan.run_dir))
    except Interrupted as error:
        events("interrupted", None, error=error.to_json())
        raise
    finally:
        context.close()
        log.close()
    checkpoints = {path.name: path for path in sorted((plan.run_dir / "checkpoints").glob("*"))}
    return RunResult(plan.run_dir, tuple(measurements), checkpoints, time.monotonic() - started)


def _ready(plan: Plan) -> Plan:
    """Check what only matters once work starts: the device, and the model, which is fetched if it was planned from declared sizes."""
    if plan.model is None or all(stage.cached for stage in plan.stages):
        return plan
    from saehub.data.model import read_config, resolve_device
    from saehub.pipeline.plan import make_plan

    fetched = "@?" in (plan.fingerprint or "")
    if fetched:
        read_config(plan.model.name, plan.model.revision, fetch=True)
    resolve_device(plan.model.device)
    # Keys hold the commit that the name stands for, which is known only now.
    return make_plan(plan.recipe, plan.catalog, base=plan.base, out=plan.out) if fetched else plan


def _refusals(plan: Plan) -> None:
    """What cannot work, before hours of training: folders to load that are no checkpoints, and exports, where each exporter is shown a small SAE
    of the architecture and kind that will be trained."""
    from saehub.checkpoint.convert import formats_for
    from saehub.checkpoint.load import codec, find_format, unknown
    from saehub.checkpoint.registry import BUILT_IN
    from saehub.errors import RecipeError
    from saehub.pipeline.plan import PlanProblem
    from saehub.testing.saes import random_sae

    known = {entry.name for entry in BUILT_IN}
    problems = []
    for stage in plan.of("load"):
        path = Path(stage.spec["load"]).expanduser()
        if not stage.cached and path.exists() and find_format(path) is None:
            error = unknown(path)
            problems.append(PlanProblem(f"saes.{stage.spec['id']}.load", error.what + (f" ({error.why})" if error.why else ""), error.fix))
    refused: dict[tuple[str, str, str], list[str]] = {}
    for stage in plan.of("export"):
        subject = plan.stage(stage.spec["subject"])
        job, config = subject.spec.get("job"), subject.spec.get("config")
        if stage.cached or subject.kind != "train" or getattr(config, "architecture", str)() not in known:
            continue
        transcoder = job.target_site is not None
        kind = "skip_transcoder" if transcoder and getattr(config, "skip", False) else "transcoder" if transcoder else "autoencoder"
        fields = {"kind": kind, "subtract_b_dec": not transcoder}
        width = 16 if job.d_in == job.d_out else 20
        sae = random_sae(config.architecture(), d_out=width, **fields)
        sae.provenance |= {"site": job.site, "target_site": job.target_site}
        reason = getattr(codec(stage.component)[1], "refusal", lambda sae: None)(sae)
        if reason:
            what = f"will be a {config.architecture()} {fields['kind']}: {reason}"
            can = f"another format: {', '.join(formats_for(sae, but=stage.component))}"
            refused.setdefault((stage.id.removesuffix(f"/{job.id}"), what, can), []).append(job.id)
    for (place, what, can), ids in refused.items():
        alone = len(ids) == 1
        problems.append(PlanProblem(f"{place}/{ids[0]}" if alone else place, f"{', '.join(ids)} {what}", f"export[].saes: leave {'it' if alone else 'them'} out, or {can}"))
    if problems:
        raise RecipeError(f"{len(problems)} part{'s' if len(problems) > 1 else ''} of the run could not work; nothing was started", problems)


def _kind_of(stage: Stage) -> str:
    return {"train": "trainer", "evaluate": "evaluator", "export": "exporter"}[stage.kind]


def _open_run_dir(plan: Plan, recipe_text: str | None, command: str | None) -> None:
    import yaml

    from saehub.recipe import to_plain

    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        text = recipe_text or yaml.safe_dump(to_plain(plan.recipe), sort_keys=False, allow_unicode=True)
        write_text_atomic(plan.run_dir / "recipe.yaml", text)
        lock = {
            "schema": 1,
            "recipe": to_plain(plan.recipe),
            "command": command,
            "model_fingerprint": plan.fingerprint,
            "stages": {stage.id: {"kind": stage.kind, "key": stage.key, "where": stage.where.relative_to(plan.base).as_posix()} for stage in plan.stages},
            "components": {item.address: item.library_versions() for item in _registered(plan)},
            "plugins": {item.address: {"distribution": item.distribution, "version": item.version} for item in _registered(plan)},
        }
        write_json_atomic(plan.run_dir / "recipe.lock", lock)
    except OSError as error:
        raise disk_error(error, plan.run_dir) or error from error


def _registered(plan: Plan) -> Iterator[Any]:
    recipe = plan.recipe
    wanted = [("extractor", recipe.extract.uses)]
    wanted += [(kind, entry.uses) for kind, entries in (("trainer", recipe.train), ("evaluator", recipe.evaluate), ("exporter", recipe.export)) for entry in entries]
    for kind, name in wanted:
        yield plan.catalog.find(kind, name)


# Walking the stages


def _walk(context: Context) -> list[SaehubError]:
    """Run pending stages kind by kind; a failed stage takes only those that need it with it."""
    errors: list[SaehubError] = []
    lost: set[str] = set()
    plan = context.plan
    for group in _groups(plan):
        pending = []
        for stage in group:
            gone = lost & set(stage.inputs)
            if gone:
                lost.add(stage.id)
                context.events("stage_failed", stage.id, error={"what": f"skipped: {sorted(gone)[0]} failed"})
            elif plan.store.complete(stage.kind, stage.key):  # asked again: another process may have finished it meanwhile
                _cached(context, stage)
            elif stage.missing:
                lost.add(stage.id)
            else:
                pending.append(stage)
        if not pending:
            continue
        if context.stop.is_set():
            raise Interrupted("stopped; finished stages are kept", fix="the same command goes on from here")
        try:
            with _disk(plan), _locked(context, pending) as still:
                if still:
                    _preflight(context, still)
                    EXECUTORS[pending[0].kind](context, still)
        except (Interrupted, KeyboardInterrupt):
            raise
        except SaehubError as error:
            if isinstance(error, FormatError):  # outside of a run a damaged file is a check that failed
                error.exit_code = StageFailed.exit_code
            errors.append(error)
        except (Exception, SystemExit) as error:  # a component may call sys.exit
            if os.environ.get("SAEHUB_TRACE") == "1":
                import traceback

                context.events("log", pending[0].id, text=traceback.format_exc())
            errors.append(stage_error(pending[0], error))
            errors[-1].__cause__ = error
        for stage in pending:
            if not plan.store.complete(stage.kind, stage.key):
                lost.add(stage.id)
                if stage.kind != "train":  # training told its own failures, job by job
                    context.events("stage_failed", stage.id, error=errors[-1].to_json() if errors else {"what": "not finished"})
    return errors


def _preflight(context: Context, stages: list[Stage]) -> None:
    """Before the first training or evaluation of a run: is the tensor the one that is meant, and fit to train on?"""
    if stages[0].kind not in ("train", "evaluate") or context.facts.get("preflight"):
        return
    from saehub.preflight.run import before_work

    context.facts["preflight"] = [{"name": "preflight", "status": "failed"}]  # until it has ended
    try:
        before_work(context)
    except SaehubError as error:
        for stage in stages if stages[0].kind == "train" else ():  # training tells its own failures, and does not begin
            context.events("stage_failed", stage.id, error=error.to_json())
        raise


@contextmanager
def _locked(context: Context, stages: list[Stage]) -> Iterator[list[Stage]]:
    """Hold the stages' locks; yields those that no other process has finished while this one waited."""
    store = context.plan.store
    with ExitStack() as locks:
        for stage in sorted(stages, key=lambda stage: stage.key):  # one order for all processes: no deadlock
            locks.enter_context(store.lock(stage.key, partial(context.events, "log", stage.id, text="another process works on this; waiting")))
        still = [stage for stage in stages if not store.complete(stage.kind, stage.key)]
        for stage in stages:
            if stage not in still:
                _cached(context, stage)
        yield still


@contextmanager
def _disk(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, plan.base) or error from error


def _groups(plan: Plan) -> list[list[Stage]]:
    """Stages that run together: all trainings, and the evaluations of one entry; everything else alone."""

    def together(stage: Stage) -> tuple:
        if stage.kind == "train":
            return ("train", stage.id) if stage.spec["own_loop"] else ("train",)
        if stage.kind == "evaluate":
            return ("evaluate", stage.spec["entry"])
        return (stage.kind, stage.id)

    groups = [list(group) for _, group in groupby(plan.stages, key=together)]
    return [part for group in groups for part in (_passes(plan, group) if group[0].kind == "train" else [group])]


def _passes(plan: Plan, stages: list[Stage]) -> list[list[Stage]]:
    """The trainings still to do, pass by pass; finished ones take no memory."""
    from saehub.pipeline.passes import of_plan

    done = [stage for stage in stages if plan.store.complete(stage.kind, stage.key)]
    return [part for part in (done, *of_plan(plan, [stage for stage in stages if stage not in done])) if part]


def _cached(context: Context, stage: Stage) -> None:
    from saehub.pipeline.environment import describe, differences

    made = context.plan.store.manifest(stage.kind, stage.key).get("environment", {})
    now = describe()
    elsewhere = differences({**made, "threads": None, "device": None, "device_name": None}, {**now, "threads": None, "device": None})
    context.events("stage_cached", stage.id, made_elsewhere=elsewhere, path=str(stage.where))


# What each kind of stage does


def _tokens(context: Context, stages: list[Stage]) -> None:
    from saehub.data.tokens import TokenPolicy, build

    (stage,) = stages
    spec, started = stage.spec, time.monotonic()
    context.events("stage_started", stage.id, detail=stage.detail)

    def emit(event: dict) -> None:
        if context.stop.is_set():
            raise Interrupted("stopped while reading text", fix="the same command starts this stage again; finished stages are kept")
        context.events("progress", stage.id, **{"unit": "tokens", "metrics": {}, **event})

    with context.plan.store.create("tokens", stage.key, manifest := context.manifest(stage)) as folder:
        dataset = build(
            [(entry, entry.weight) for entry in spec["mix"]],
            context.plan.model,
            TokenPolicy(**{**spec["policy"], "exclude": tuple(spec["policy"]["exclude"])}),
            folder / "tokens",
            rows=spec["rows"],
            calibration=spec["calibration"],
            seed=spec["seed"],
            repeat=spec["repeat"],
            emit=emit,
            place="data.train" if spec["name"] == "train" else f"data.eval.{spec['name']}",
        )
        manifest["dataset"] = dataset.manifest
        manifest["seconds"] = time.monotonic() - started
    context.events("stage_finished", stage.id, seconds=manifest["seconds"], path=str(stage.where))


def _load(context: Context, stages: list[Stage]) -> None:
    from saehub.checkpoint.format import save
    from saehub.checkpoint.load import load

    (stage,) = stages
    context.events("stage_started", stage.id, detail=stage.detail)
    sae = load(stage.spec["load"])
    if stage.spec["site"]:
        sae.provenance["site"] = stage.spec["site"]
    if not sae.provenance.get("site"):
        raise StageFailed(
            f"{stage.spec['load']} does not say which site it belongs to", where=stage.id, fix=f"saes: [{{id: {stage.spec['id']}, load: …, site: resid_post.6}}]"
        )
    with context.plan.store.create("load", stage.key, context.manifest(stage)) as folder:
        save(sae, folder / "checkpoint")
    context.events("stage_finished", stage.id, path=str(stage.where))


def _train(context: Context, stages: list[Stage]) -> None:
    if stages[0].spec["own_loop"]:
        from saehub.pipeline.loop import run_loop

        run_loop(context, stages[0])
    else:
        from saehub.pipeline.train import run_pass

        run_pass(context, stages)


def _export(context: Context, stages: list[Stage]) -> None:
    """Write the target's folder and certify it: source and target run with their own libraries on the golden probe (conversion.json)."""
    from saehub.checkpoint.convert import convert

    (stage,) = stages
    started = time.monotonic()
    context.events("stage_started", stage.id, detail=stage.detail)

    def invoke(registered: Any, config: Any, method: str, **arguments: Any) -> Any:
        return getattr(context.components.make(registered, config), method)(**arguments)

    source = context.plan.stage(stage.spec["subject"]).where / "checkpoint"
    with context.plan.store.create("export", stage.key, manifest := context.manifest(stage)) as folder:
        certificate = convert(source, folder / "export", stage.component, invoke=invoke)
        manifest |= {"outcome": certificate.outcome, "reason": certificate.reason, "seconds": time.monotonic() - started}
    context.events("log", stage.id, text=certificate.outcome)
    context.events("stage_finished", stage.id, seconds=manifest["seconds"], outcome=certificate.outcome, path=str(stage.where))


EXECUTORS: Mapping[str, Callable[[Context, list[Stage]], None]] = {
    "tokens": _tokens,
    "load": _load,
    "train": _train,
    "evaluate": evaluate_stages,
    "export": _export,
}


# The run folder


def _publish(context: Context, seconds: float, errors: list[SaehubError]) -> list[Measurement]:
    """Checkpoints, exports, results, run card and report of what is finished, also when something failed."""
    from saehub.pipeline.card import run_card
    from saehub.report.build import write_report

    plan, store = context.plan, context.plan.store
    measurements: list[Measurement] = []
    done = [stage for stage in plan.stages if store.complete(stage.kind, stage.key)]
    with _disk(plan):
        shutil.rmtree(plan.run_dir / "checkpoints", ignore_errors=True)
        shutil.rmtree(plan.run_dir / "exports", ignore_errors=True)
        for stage in done:
            if stage.kind in ("train", "load"):
                link_or_copy(stage.where / "checkpoint", plan.run_dir / "checkpoints" / stage.id.partition("/")[2])
            elif stage.kind == "export":
                link_or_copy(stage.where / "export", plan.run_dir / "exports" / stage.id.partition("/")[2])
            elif stage.kind == "evaluate":
                measurements += read_measurements(stage.where)
        measurements += stopped_rows(plan)
        write_json_atomic(plan.run_dir / "results.json", {"schema": 1, "measurements": [row.to_json() for row in measurements]})
        write_json_atomic(plan.run_dir / "run_card.json", run_card(context, done, seconds, errors, measurements))
        write_report(plan.run_dir)
    return measurements


@contextmanager
def _signals(context: Context) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks the stages to save and stop; the second one does what it always does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        context.stop.set()
        for kind, handler in before.items():
            signal.signal(kind, handler)
        context.events("log", None, text="stopping after this batch and saving; press Ctrl-C again to stop at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
