"""`saehub eval`: one checkpoint and one evaluator in; a results table out."""

from __future__ import annotations

import click

from saehub.cli.lazy import SETTINGS
from saehub.cli.options import json_option
from saehub.cli.talk import out_json


@click.command(context_settings=SETTINGS)
@click.argument("checkpoint", metavar="CKPT")
@click.option("--with", "evaluator", required=True, metavar="EVALUATOR", help="The evaluator, such as native/core.")
@click.option("--model", metavar="MODEL", help="The language model (default: the one that the checkpoint names).")
@click.option("--data", "data", metavar="SOURCE", multiple=True, help="Text: builtin/…, a file, a folder, an HF dataset; NAME=SOURCE names it (repeatable).")
@click.option("--set", "settings", metavar="KEY=V", multiple=True, help="A setting of the evaluator (repeatable).")
@json_option()
def evaluate(checkpoint: str, evaluator: str, model: str | None, data: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> int:
    """Measure one checkpoint with one evaluator."""
    from saehub.cli.failure import OK, STAGE
    from saehub.pipeline import single

    rows = list(single.evaluate(checkpoint, evaluator, model, data, settings))
    if as_json:
        out_json({"measurements": [row.to_json() for row in rows]})
    else:
        from saehub.cli import render

        render.results(rows)
    return STAGE if any(row.status == "failed" for row in rows) else OK
