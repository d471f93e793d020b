"""One checkpoint and one evaluator in; the same run folder that a recipe with only these two would leave out (`saehub eval`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import SaehubError, UsageError
from saehub.pipeline.events import Listener
from saehub.pipeline.run import RunResult, run

if TYPE_CHECKING:
    from saehub.recipe.tree import Problem


def recipe_for(
    checkpoint: str,
    evaluator: str,
    *,
    model: str | None = None,
    data: Sequence[str] = (),
    tokens: int = 32_768,
    with_: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The recipe, as plain data: model, site and token policy from the checkpoint unless given.

    Args:
        checkpoint: a folder in any known format, or hf://org/repo/folder.
        data: text sources, each `SOURCE` or `NAME=SOURCE` (`out_of_sample=builtin/python-code`); without any, the held-out split of what
            the checkpoint says it was trained on.
        tokens: rows per dataset.

    Raises:
        UsageError: the checkpoint does not say what was not given.
    """
    from saehub.checkpoint.load import load

    known = load(checkpoint).provenance
    model_facts, tokens_facts = known.get("model") or {}, known.get("tokens") or {}
    name = model or model_facts.get("name")
    if not name:
        raise UsageError(f"{checkpoint} does not say which model it belongs to", fix="--model builtin/tiny-llama, a directory or a Hugging Face id")
    if not known.get("site"):
        raise UsageError(f"{checkpoint} does not say which site it belongs to", fix="write a recipe with saes: [{id: x, load: …, site: resid_post.6}]")
    evaluated = _datasets(data, (known.get("data") or {}).get("sources") or [])
    if not evaluated:
        raise UsageError(f"{checkpoint} does not say what it was trained on", fix="--data builtin/python-docs, a file or a dataset id")
    policy = {key: tokens_facts[key] for key in ("context", "bos", "exclude", "template") if tokens_facts.get(key) is not None}
    entry: dict[str, Any] = {"name": name, **{key: model_facts[key] for key in ("dtype", "attention") if model_facts.get(key) and not model}}
    if model_facts.get("revision") and not model:
        entry["revision"] = model_facts["revision"]
    if "context" not in policy:
        policy["context"] = _context(name, entry.get("revision"))
    return {
        "saehub": 1,
        "name": f"eval-{Path(checkpoint.rstrip('/')).name}",
        "model": entry,
        "data": {
            "train": {"tokens": tokens, **policy},
            "eval": {dataset: {**value, "tokens": tokens} for dataset, value in evaluated.items()},
        },
        "extract": {"sites": [known["site"]]},
        "saes": [{"id": "sae", "load": checkpoint}],
        "evaluate": [*_read_by(evaluator), {"uses": evaluator, "with": dict(with_ or {})}],
    }


def _context(model: str, revision: str | None) -> int:
    """Tokens a sequence where the checkpoint names none: a recipe's default, or what the model accepts if that is less."""
    from saehub.data.model import read_shape
    from saehub.recipe.schema import TrainData

    try:
        return min(TrainData.context, read_shape(model, revision).context)
    except SaehubError:  # the plan says what is wrong with the model
        return TrainData.context


def _read_by(evaluator: str) -> list[dict[str, Any]]:
    """The evaluators whose measurements this one judges, each with its default settings; none where it measures itself."""
    from saehub.plugins import catalog

    try:
        config = catalog().find("evaluator", evaluator).load_config()
    except SaehubError:  # the check of the recipe says what is wrong
        return []
    return [{"uses": address} for address in getattr(config, "reads", {})]


def _datasets(data: Sequence[str], trained_on: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    known = {entry["source"] for entry in trained_on}
    for text in data:
        name, equals, source = text.rpartition("=")
        found[name if equals else f"data{len(found) + 1}" if found else "data"] = {"mix": [{"source": source, "split": _split(source, known)}]}
    if not found and trained_on:
        mix = [{**{key: value for key, value in entry.items() if value is not None}, "split": "heldout"} for entry in trained_on]
        found["in_sample"] = {"mix": mix}
    return found


def _split(source: str, trained_on: set[str]) -> str:
    """All of a file that training never saw; of everything else the documents that are held out."""
    from saehub.data.sources import is_local

    return "all" if source not in trained_on and is_local(source) else "heldout"


def evaluate(checkpoint: str, evaluator: str, *, listeners: Iterable[Listener] = (), out: Path | None = None, command: str | None = None, **what: Any) -> RunResult:
    """Evaluate one checkpoint; keywords are those of `recipe_for` and `run`. A RecipeError names options of `saehub eval`, not lines of that recipe."""
    import yaml

    from saehub.errors import RecipeError
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.recipe import check_text

    found = catalog()
    if "several_saes" in (registered := found.find("evaluator", evaluator)).component.needs:
        fix = f"a recipe with saes: [{{id: a, load: {checkpoint}}}, {{id: b, load: …}}], evaluate: [{{uses: {registered.address}}}]"
        raise UsageError(f"{registered.address} compares SAEs, and saehub eval measures one", fix=fix)
    text = yaml.safe_dump(recipe_for(checkpoint, evaluator, **what), sort_keys=False, allow_unicode=True)
    at = partial(_at, checkpoint, evaluator, what)
    refused = f"{checkpoint} cannot be evaluated with {evaluator}"
    recipe, problems = check_text(text, "recipe")
    if recipe is None:
        raise RecipeError(refused, [at(problem.path, problem.message, problem.hint, problem.severity) for problem in problems])
    try:
        plan = make_plan(recipe, found, out=out, locate=at)
    except RecipeError as error:
        raise RecipeError(refused, error.problems, why=None if error.problems else error.what, fix=None if error.problems else error.fix) from error
    try:
        return run(plan, listeners, recipe_text=text, command=command)
    except SaehubError as error:
        if error.where and error.where.startswith(("data.", "model", "extract.")):
            place = at(error.where, error.what).file
            error.fix = error.fix and error.fix.replace(error.where, place.split(" ")[0])
            error.where = place
        raise


def _at(checkpoint: str, evaluator: str, what: Mapping[str, Any], path: str, message: str, hint: str | None = None, severity: Any = "error") -> Problem:
    """A problem of the recipe at `path`, told of what stood on the command line: an option, or the checkpoint that filled it in."""
    from saehub.recipe.plain import dump_inline
    from saehub.recipe.tree import Problem

    section, *rest = path.split(".")
    place = checkpoint
    if path.endswith(".tokens"):
        place = f"--tokens {what.get('tokens')}"
    elif section == "model" and what.get("model"):
        place = f"--model {what['model']}"
    elif section == "data" and what.get("data"):
        given = list(what["data"])
        named = [text for name, text in zip(_datasets(given, []), given, strict=False) if path.startswith(f"data.eval.{name}.") or repr(name) in message]
        place = f"--data {(named or given)[0]}"
    elif section == "evaluate":
        settings = {key: f"--set {key}={dump_inline(value)}" for key, value in (what.get("with_") or {}).items()}
        named = [text for key, text in settings.items() if path.partition(".with.")[2].split(".")[0] == key or f"unknown key {key!r}" in message]
        place = named[0] if named else f"--with {evaluator}"
    return Problem(place, 0, 0, "", message, hint, severity=severity)
