"""A finished run in; the same run made again from nothing, and what came out the same, out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

from saehub.cli.failure import FAILED, OK
from saehub.cli.talk import clean, out_json_line, say, style
from saehub.errors import Interrupted, MissingDependency, RecipeError, SaehubError, UsageError
from saehub.report.compare import compare
from saehub.report.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """One thing that was compared."""

    what: str
    """`model`, `text`, `tensors`, `failure` (a stage that failed in either) or `number`."""
    name: str
    verdict: str
    """`identical`, `agrees` (a number, within its error), `differs` or `missing`."""
    detail: str = ""


def replay(run: RunFolder, folder: Path | None, *, as_json: bool) -> int:
    """Run the recipe of `run.lock` in a store of its own, then compare. The store goes when the replay is finished."""
    from saehub.cli.running import run_plan
    from saehub.pipeline.plan import make_plan
    from saehub.pipeline.workspace import home
    from saehub.plugins import catalog

    found = _recipe(run)
    folder = (folder or home() / "replays" / run.name).absolute()
    if folder == run.path:
        raise UsageError("the replay would overwrite the run itself", fix="another --out")
    base = home() / "replays" / ".stores" / run.name
    plan = make_plan(found, catalog(), base=base, out=folder)
    _tell_changes(run, plan)
    try:
        run_plan(plan, as_json=as_json, quiet=True)
    except Interrupted:
        raise
    except SaehubError as error:
        # A run that failed is replayed by one that fails alike; what it finished is compared like that of any other.
        if not _failed(run) or not (folder / "results.json").is_file():
            raise
        say(f"the replay failed, as the run did: {clean(error.what)}")
    outcomes = outcomes_of(run, RunFolder(folder))
    shutil.rmtree(base, ignore_errors=True)
    bad = [item for item in outcomes if item.verdict in ("differs", "missing")]
    verdict = "differs" if bad else "identical" if all(item.verdict == "identical" for item in outcomes) else "agrees"
    if as_json:
        out_json_line(
            {"schema": 1, "kind": "replay", "run": str(run.path), "replay": str(folder), "verdict": verdict, "outcomes": outcomes}
        )
    else:
        _print(outcomes, verdict)
        if verdict != "identical" and run.card.get("resume") == "inexact":
            say(f"the run itself was resumed on another footing ({'; '.join(run.card.get('resume_changes') or [])}), which cannot be repeated")
    return FAILED if bad else OK


def _recipe(run: RunFolder) -> Any:
    """The recipe as it was understood then (from recipe.lock), checked against what is installed now."""
    import yaml

    from saehub.plugins import catalog
    from saehub.recipe.check import check_text

    if not run.lock.get("recipe"):
        raise UsageError(
            f"{run.path} cannot be replayed",
            why="it has no recipe.lock, which holds the recipe with all its settings",
            fix="keep recipe.lock beside run_card.json",
        )
    if not run.measurements and not run.checkpoints():
        raise UsageError(f"{run.name} has nothing to compare with (status: {run.status})", fix=f"finish it first: {run.resume or 'run its recipe again'}")
    _require(run, catalog())
    text = yaml.safe_dump(run.lock["recipe"], sort_keys=False, allow_unicode=True)
    found, problems = check_text(text, f"recipe of {run.name}", (), catalog())
    errors = [problem for problem in problems if getattr(problem, "severity", "error") == "error"]
    if found is None or errors:
        raise RecipeError(
            f"the recipe of {run.name} is not valid here",
            errors,
            why="written by another version, or its plugins are not installed",
            fix="saehub plugins ls",
        )
    return found


def _require(run: RunFolder, known: Any) -> None:
    """MissingDependency (exit code 3) with the pip command where plugins that the run used are not installed here."""
    here = {address for kind in ("extractor", "trainer", "evaluator", "exporter") for address in known.components(kind)}
    here |= {address for address in run.lock.get("plugins", {}) if any(row.plugin == address.partition("/")[0] and row.status != "ok" for row in known.rows())}
    absent = {address: item for address, item in run.lock.get("plugins", {}).items() if address not in here}
    if absent:
        packages = dict.fromkeys((str(item["distribution"]), str(item["version"])) for item in absent.values())
        raise MissingDependency(
            f"{run.name} cannot be replayed here: nothing that is installed provides {', '.join(sorted(absent))}",
            why=f"then it came from {', '.join(f'{name} {version}' for name, version in packages)}",
            fix=f"pip install {' '.join(repr(f'{name}=={version}') for name, version in packages)} (or the folder of a plugin of your own)",
        )


def _tell_changes(run: RunFolder, plan: Any) -> None:
    """Stages whose key is another one than then: the comparison will show whether that matters."""
    keys = {name: stage["key"] for name, stage in run.lock.get("stages", {}).items()}
    changed = [stage.id for stage in plan.stages if keys.get(stage.id) not in (None, stage.key)]
    if changed:
        say(
            style("warning", fg="yellow")
            + f": other inputs than then (Python's own text, a model, a library or a component): {', '.join(changed)}"
        )


def outcomes_of(first: RunFolder, second: RunFolder) -> list[Outcome]:
    """Hashes of the model, of token data and of tensors, then every number."""
    found = []
    models = [(run.card.get("model") or {}).get("fingerprint") for run in (first, second)]
    if models[0]:
        detail = "" if models[0] == models[1] else f"{models[0][:19]} → {str(models[1])[:19]}"
        found.append(Outcome("model", str(first.card["model"].get("name")), "differs" if detail else "identical", detail))
    for what, part, name in (("text", "data", "hash"), ("tensors", "saes", "tensors_hash")):
        before, after = first.card.get(part) or {}, second.card.get(part) or {}
        for key, entry in before.items():
            old, new = (entry or {}).get(name), (after.get(key) or {}).get(name)
            verdict = "missing" if new is None else "identical" if old == new else "differs"
            if old is not None:
                found.append(Outcome(what, key, verdict, "" if verdict == "identical" else f"{str(old)[:12]} → {str(new)[:12]}"))
    then, now = _failed(first), _failed(second)
    for stage in dict.fromkeys([*then, *now]):
        same = then.get(stage) == now.get(stage)
        found.append(Outcome("failure", stage, "identical" if same else "differs", "" if same else f"{then.get(stage, 'finished')} → {now.get(stage, 'finished')}"))
    differences, remarks = compare(first.measurements, second.measurements)
    numbers_ = [_number(item) for item in differences]
    # Where every number agrees, other tensors are another machine's rounding, not another result.
    if numbers_ and all(item.verdict in ("identical", "agrees") for item in numbers_):
        found = [
            Outcome(item.what, item.name, "agrees", f"{item.detail}; the numbers agree")
            if item.what == "tensors" and item.verdict == "differs"
            else item
            for item in found
        ]
    return found + numbers_ + [Outcome("number", remark, "missing") for remark in remarks]


def _failed(run: RunFolder) -> dict[str, str]:
    """`{stage: "failed: why"}` of what failed when the run last started."""
    return {stage: state for stage, state in run.stages().items() if state.startswith("failed")}


def _number(item: Any) -> Outcome:
    from saehub.report import numbers
    from saehub.report.table import dataset_label

    name = f"{'+'.join(item.subjects_a)} {item.metric} {dataset_label(item.dataset)}"
    if item.a == item.b:
        return Outcome("number", name, "identical")
    detail = f"{numbers.with_error(item.a, item.stderr_a)} → {numbers.with_error(item.b, item.stderr_b)}"
    known = None not in (item.delta, item.stderr_a, item.stderr_b)  # the two errors, not that of paired differences: two results, not a ranking
    close = known and abs(item.delta) <= 1.96 * hypot(item.stderr_a, item.stderr_b)
    return Outcome("number", name, "agrees" if close or item.reason == "the 95 % intervals overlap" else "differs", detail)


def _print(outcomes: list[Outcome], verdict: str) -> None:
    from saehub.cli import render

    same = sum(item.verdict == "identical" for item in outcomes)
    other = [item for item in outcomes if item.verdict != "identical"]
    if other:
        render.table(("what", "name", "verdict", "detail"), [(item.what, item.name, item.verdict, item.detail) for item in other])
    say(f"{same} of {len(outcomes)} compared hashes and numbers are identical")
    words = {
        "identical": "the run replays bit by bit",
        "agrees": "not bit-identical, but every number agrees within its error",
        "differs": "the run does not replay",
    }
    say(style(words[verdict], fg={"identical": "green", "agrees": "yellow", "differs": "red"}[verdict]))
