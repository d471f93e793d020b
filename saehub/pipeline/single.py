"""One checkpoint and one evaluator in; the same run folder that a recipe with only these two would leave out (`saehub eval`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saehub.errors import UsageError
from saehub.pipeline.events import Listener
from saehub.pipeline.run import RunResult, run


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


def _read_by(evaluator: str) -> list[dict[str, Any]]:
    """The evaluators whose measurements this one judges, each with its default settings; none where it measures itself."""
    from saehub.errors import SaehubError
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


def evaluate(checkpoint: str, evaluator: str, *, listeners: Iterable[Listener] = (), out: Path | None = None, **what: Any) -> RunResult:
    """Evaluate one checkpoint; keywords are those of `recipe_for`."""
    import yaml

    from saehub.errors import RecipeError
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.recipe import check_text

    text = yaml.safe_dump(recipe_for(checkpoint, evaluator, **what), sort_keys=False, allow_unicode=True)
    recipe, problems = check_text(text, f"saehub eval {checkpoint}")
    if recipe is None:
        raise RecipeError(f"{checkpoint} cannot be evaluated with {evaluator}", problems)
    return run(make_plan(recipe, catalog(), out=out), listeners, recipe_text=text)
