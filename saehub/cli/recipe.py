"""`saehub recipe …`: names and files of recipes in; listings, copies, problems, plans and finished runs out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saehub.cli.lazy import Group
from saehub.cli.options import json_option, set_option
from saehub.cli.talk import clean, out, out_json, say, style
from saehub.errors import MissingDependency, RecipeError, UsageError

if TYPE_CHECKING:
    from saehub.pipeline.plan import Plan

NAME = click.argument("name", metavar="FILE|NAME")
OUT = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="The run folder (default: a new one below .saehub/runs)."
)
STRICT = click.option("--strict-cache", is_flag=True, help="Do not reuse results that were made with other library versions.")


@click.group(cls=Group)
def recipe() -> None:
    """List, copy, check, plan and run recipes."""


@recipe.command("ls")
@json_option()
def ls(as_json: bool) -> None:
    """List the recipes in the box and those of plugins."""
    from saehub.recipe import library

    entries = [_entry(item) for item in library.listing()]
    if as_json:
        return out_json({"recipes": entries})
    if not entries:
        return say("no recipe is installed; write one, or reinstall saehub")
    from saehub.cli import render

    render.table(("recipe", "from", "what it does"), [(item["name"], item["origin"], item["description"]) for item in entries])
    say("\nsaehub recipe show NAME · saehub recipe plan NAME · saehub recipe run NAME")


def _entry(item: object) -> dict:
    return {"name": item.name, "path": str(item.path), "description": item.description, "origin": item.origin}


@recipe.command("show")
@NAME
@set_option
@json_option("Print the recipe with `extends`, `--set`, sweeps and defaults filled in, as JSON.")
def show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe: the file as it is written, or with --json as it is understood."""
    from saehub.recipe import library, to_plain

    path = library.find(name)
    if not as_json:
        if overrides:
            raise UsageError("--set changes what a recipe means, not its text", fix="add --json to see the recipe as it is understood")
        return click.echo(Path(path).read_text(encoding="utf-8").rstrip("\n"))
    found, problems = _checked(name, overrides)
    if found is None:
        raise RecipeError(_count(problems, name), problems)
    out_json({"path": str(path), "recipe": to_plain(found)})


@recipe.command("cp")
@click.argument("name", metavar="NAME")
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite DEST.")
def cp(name: str, destination: Path, force: bool) -> None:
    """Copy a recipe, comments included, to change it."""
    from saehub.recipe import library

    source = Path(library.find(name))
    target = destination / source.name if destination.is_dir() else destination
    if target.suffix not in (".yaml", ".yml"):
        target = target.with_name(target.name + ".yaml")
    if target.exists() and not force:
        raise UsageError(f"{target} exists", fix=f"another name, or: saehub recipe cp {shlex.join([name, str(target)])} --force")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist", fix=f"mkdir -p {shlex.quote(str(target.parent))}")
    target.write_bytes(source.read_bytes())
    out(str(target))
    say(f"next: saehub recipe check {shlex.quote(str(target))}")


@recipe.command("check")
@NAME
@set_option
@json_option()
def check(name: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check a recipe and report all its problems at once."""
    from saehub.cli.failure import MISSING, OK, USAGE, problem_to_json, show_problem

    found, problems = _checked(name, overrides, planned=True)
    kinds = [severity(problem) for problem in problems]
    code = USAGE if "error" in kinds or found is None else MISSING if "missing" in kinds else OK
    if as_json:
        out_json(
            {
                "recipe": getattr(found, "name", None),
                "ok": code == OK,
                "exit_code": code,
                "problems": [problem_to_json(item) for item in problems],
            }
        )
        return code
    for problem in problems:
        show_problem(problem, err=False)
    if code == OK and not problems:
        out(f"{clean(found.name)}: ok")
    say(_count(problems, name) if problems else f"next: saehub recipe plan {shlex.quote(name)}")
    return code


@recipe.command("plan")
@NAME
@set_option
@OUT
@STRICT
@json_option()
def plan(name: str, overrides: tuple[str, ...], out: Path | None, strict_cache: bool, as_json: bool) -> int:
    """Show every stage of a run, what is cached, and what it will cost.

    Nothing heavy is loaded and nothing is written.
    """
    from saehub.cli.failure import MISSING, OK

    made, missing = _plan(name, overrides, out, strict_cache)
    if as_json:
        out_json({"plan": made.to_json(), "runnable": not missing, "missing": missing})
        return MISSING if missing else OK
    from saehub.cli import render

    render.plan(made)
    _warn(made)
    if missing:
        _tell_missing(missing)
        return MISSING
    say(f"\nnext: saehub recipe run {shlex.join([name, *(word for item in overrides for word in ('--set', item))])}")
    return OK


@recipe.command("run")
@NAME
@set_option
@OUT
@STRICT
@click.option("--dry-run", is_flag=True, help="Only show the plan.")
@click.option("--log", "log", multiple=True, metavar="LOGGER", help="Log to tensorboard or wandb too (repeatable).")
@json_option("Print every event as one JSON line on stdout; the last line is the summary.")
@click.pass_context
def run(
    ctx: click.Context, name: str, overrides: tuple[str, ...], out: Path | None, strict_cache: bool, dry_run: bool, log: tuple[str, ...], as_json: bool
) -> int:
    """Run a recipe.

    What is finished is skipped, and the same command after an interruption goes on where it was.
    """
    from saehub.cli.running import run_plan

    if dry_run:
        return ctx.invoke(plan, name=name, overrides=overrides, out=out, strict_cache=strict_cache, as_json=as_json)
    made, missing = _plan(name, overrides, out, strict_cache)
    if missing:
        raise MissingDependency(f"{name} was not started: {missing[0]['what']}", fix=missing[0]["fix"])
    return run_plan(made, recipe_text=_text(name, overrides), as_json=as_json, log=log)


def _text(name: str, overrides: tuple[str, ...]) -> str:
    """The recipe as it was given: the file's text, and below it what --set changed."""
    from saehub.recipe import library

    text = Path(library.find(name)).read_text(encoding="utf-8")
    return (
        text
        if not overrides
        else text.rstrip("\n") + "\n\n# Run with:\n" + "".join(f"#   --set {shlex.quote(item)}\n" for item in overrides)
    )


def _plan(name: str, overrides: tuple[str, ...], out: Path | None, strict_cache: bool) -> tuple[Plan, list[dict]]:
    """The plan, and for every component that lacks a library: {"component", "what", "fix"}. Problems are raised all at once."""
    from saehub.cli.failure import show_problem
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.recipe import locator

    found, problems = _checked(name, overrides)
    if found is None:
        _, problems = _checked(name, overrides, planned=True)
        raise RecipeError(_count(problems, name), problems, fix=_mend(problems, name))
    for problem in problems:
        if severity(problem) == "warning":
            show_problem(problem)
    made = make_plan(found, catalog(), out=out, strict_cache=strict_cache, locate=locator(name, overrides, catalog()))
    return made, _missing(made)


KINDS = {"train": "trainer", "evaluate": "evaluator", "export": "exporter", "activations": "extractor"}
"""Kind of stage -> kind of component."""


def _missing(made: Plan) -> list[dict]:
    found = {}
    for stage in made.stages:
        if stage.missing and not stage.cached and stage.component not in found:
            try:
                made.catalog.require(made.catalog.find(KINDS[stage.kind], stage.component))
            except MissingDependency as error:
                found[stage.component] = {"component": stage.component, "what": error.what, "fix": error.fix}
    return list(found.values())


def _tell_missing(missing: list[dict]) -> None:
    for item in missing:
        say(style("missing", fg="yellow") + f": {item['what']}\n    fix: {item['fix']}")


def _warn(made: Plan) -> None:
    for words in made.warnings:
        say(style("warning", fg="yellow") + f": {clean(words)}")


def _checked(name: str, overrides: tuple[str, ...], planned: bool = False) -> tuple[Any, list]:
    """The recipe (None with errors) and all its problems (`planned`: those of its plan too); a name that is no recipe is a UsageError of its own."""
    from saehub.plugins import catalog
    from saehub.recipe import library

    library.find(name)
    if planned:
        from saehub.pipeline.problems import check as check_recipe
    else:
        from saehub.recipe.check import check as check_recipe
    return check_recipe(name, list(overrides), catalog())


def _mend(problems: list, name: str) -> str:
    """What to change: the recipe's file, what --set says, or both."""
    errors = [problem for problem in problems if severity(problem) == "error"]
    options = list(dict.fromkeys(problem.file for problem in errors if problem.file.startswith("--set ")))
    words = [f"correct {', '.join(shlex.quote(option.removeprefix('--set ')).join(('--set ', '')) for option in options)}"] if options else []
    words += [f"edit it, then: saehub recipe check {shlex.quote(name)}"] if any(problem.file not in options for problem in errors) else []
    return "; ".join(words)


def severity(problem: object) -> str:
    """`error`, `warning` or `missing`."""
    return getattr(problem, "severity", "error")


def _count(problems: list, name: str) -> str:
    """`4 problems in bad.yaml, 1 warning`."""
    counts = {kind: sum(severity(problem) == kind for problem in problems) for kind in ("error", "missing", "warning")}
    words = {"error": ("problem", "problems"), "missing": ("missing library", "missing libraries"), "warning": ("warning", "warnings")}
    parts = [f"{n} {words[kind][n != 1]}" for kind, n in counts.items() if n]
    return f"{', '.join(parts)} in {name}"
