"""`saehub eval`: one checkpoint and one evaluator in; a results table out."""

from __future__ import annotations

from pathlib import Path

import click

from saehub.cli.lazy import SETTINGS
from saehub.cli.options import json_option
from saehub.cli.talk import out_json, say


@click.command(context_settings=SETTINGS)
@click.argument("checkpoint", metavar="CKPT")
@click.option("--with", "evaluator", required=True, metavar="EVALUATOR", help="The evaluator, such as native/core.")
@click.option("--model", metavar="MODEL", help="The language model (default: the one that the checkpoint names).")
@click.option(
    "--data",
    "data",
    metavar="SOURCE",
    multiple=True,
    help="Text: builtin/…, a file, a folder, an HF dataset; NAME=SOURCE names it (repeatable). Default: held-out text of its training.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=32_768, show_default=True, help="Activation rows of each dataset.")
@click.option("--set", "settings", metavar="KEY=V", multiple=True, help="A setting of the evaluator (repeatable).")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="The run folder (default: a new one below .saehub/runs)."
)
@json_option()
def evaluate(
    checkpoint: str,
    evaluator: str,
    model: str | None,
    data: tuple[str, ...],
    tokens: int,
    settings: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure one checkpoint with one evaluator."""
    from saehub.cli.failure import OK, STAGE
    from saehub.cli.running import watcher
    from saehub.pipeline import single

    with watcher() as watch:
        result = single.evaluate(
            checkpoint, evaluator, model=model, data=data, tokens=tokens, with_=dict(map(setting, settings)), out=out, listeners=(watch,)
        )
    if as_json:
        out_json({"run_dir": str(result.run_dir), "measurements": result.results})
    else:
        from saehub.cli import render

        render.results(result.measurements)
        say(f"\nreport:  {result.run_dir / 'report.html'}")
    return STAGE if any(row.status == "failed" for row in result.measurements) else OK


def setting(text: str) -> tuple[str, object]:
    """`k=64` as (`k`, 64), the value read by the rules of a recipe."""
    from saehub.errors import RecipeError, UsageError
    from saehub.recipe.load import load_text
    from saehub.recipe.tree import plain

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text} is not KEY=VALUE", fix="--set memory=1e9")
    document = load_text(value, f"--set {text}")
    if document.problems:
        raise RecipeError(f"--set {text} cannot be read", document.problems)
    return name.strip(), None if document.root is None else plain(document.root)
