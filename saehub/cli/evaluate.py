"""`saehub eval`: one checkpoint and one evaluator in; a results table out."""

from __future__ import annotations

import re
from pathlib import Path

import click

from saehub.cli.lazy import SETTINGS
from saehub.cli.options import json_option
from saehub.cli.talk import State, out_json, say


class Command(click.Command):
    """`--NAME-json` and `--NAME-json=DIR`, for whatever result format a plugin calls so, are short for `--results-as`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with short forms written out."""
        short = re.compile(r"--(\w[\w-]*-json)(=.*)?")
        found = [(arg, short.fullmatch(arg)) for arg in args]
        return super().parse_args(ctx, [part for arg, hit in found for part in (["--results-as", arg[2:]] if hit else [arg])])


@click.command(cls=Command, context_settings=SETTINGS)
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
@click.option(
    "--results-as",
    "formats",
    metavar="FORMAT[=DIR]",
    multiple=True,
    help="Also write the results in another library's files, such as saebench-json (repeatable; --saebench-json[=DIR] is short for it). Default: results/ in the run folder.",
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
    formats: tuple[str, ...],
    as_json: bool,
) -> int:
    """Measure one checkpoint with one evaluator."""
    from saehub.cli.failure import OK, STAGE
    from saehub.cli.running import watcher
    from saehub.pipeline import single
    from saehub.report import foreign

    for wanted in formats:
        foreign.check(wanted)
    command = click.get_current_context().ensure_object(State).command
    with watcher() as watch:
        result = single.evaluate(
            checkpoint, evaluator, model=model, data=data, tokens=tokens, with_=dict(map(setting, settings)), out=out, listeners=(watch,),
            command=command,
        )  # fmt: skip
    written = [foreign.write(result.measurements, wanted, result.run_dir) for wanted in formats]
    if as_json:
        out_json({"run_dir": str(result.run_dir), "measurements": result.results, **({"written": written} if formats else {})})
    else:
        from saehub.cli import render

        render.results(result.measurements)
        say(f"\nreport:  {result.run_dir / 'report.html'}")
        for told in written:
            say(f"{told['format']}:  {len(told['files'])} file{'s' if len(told['files']) > 1 else ''} in {told['folder']}")
            for line in told["left_out"]:
                say(f"  left out: {line}")
    return STAGE if any(row.status == "failed" for row in result.measurements) else OK


def setting(text: str, form: str = "KEY=VALUE, such as --set memory=1e9") -> tuple[str, object]:
    """`k=64` as (`k`, 64), the value read by the rules of a recipe; `form` is what the option should look like."""
    from saehub.errors import UsageError
    from saehub.recipe.load import load_text
    from saehub.recipe.tree import plain

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text} has no {'value' if name.strip() else 'name'}", fix=f"--set {form}")
    document = load_text(value, f"--set {text}")
    if document.problems:
        raise UsageError(f"--set {text} cannot be read", why=document.problems[0].message, fix=f"--set {form}")
    return name.strip(), None if document.root is None else plain(document.root)
