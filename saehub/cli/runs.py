"""`saehub runs …`: run folders in; listings, results, comparisons, replays and a cleared store out."""

from __future__ import annotations

from pathlib import Path

import click

from saehub.cli.lazy import Group
from saehub.cli.options import json_option
from saehub.cli.talk import clean, out, out_json, say
from saehub.report import numbers

RUN = click.argument("run", metavar="RUN")


@click.group(cls=Group)
def runs() -> None:
    """List, show, compare and replay runs; clear the store.

    RUN is a run's name, the beginning of it, `last`, the path of a run folder or of its run_card.json, or result files of
    another library, or a folder of them, that a plugin can read.
    """


def _known() -> list[Path]:
    from saehub.pipeline import workspace

    return workspace.runs(workspace.home())


def _find(name: str):
    from saehub.report.foreign import foreign
    from saehub.report.run_folder import find, is_run

    path = Path(name)
    other = None if is_run(path) or (path.is_file() and is_run(path.parent)) else foreign(path)
    return other or find(name, _known())


@runs.command("ls")
@json_option()
def ls(as_json: bool) -> None:
    """List the runs below SAEHUB_HOME, the oldest first."""
    from saehub.report.run_folder import RunFolder

    rows = [_row(RunFolder(path)) for path in _known()]
    if as_json:
        return out_json({"runs": rows})
    if not rows:
        return say("no runs yet; start one: saehub recipe run topk-llama")
    from saehub.cli import render

    render.table(
        ("run", "status", "started", "took", "SAEs"),
        [
            (row["name"], row["status"], numbers.moment(row["started"]), numbers.duration(row["seconds"]), ", ".join(row["saes"]))
            for row in rows
        ],
    )


def _row(run) -> dict:
    return {
        "name": run.name,
        "path": str(run.path),
        "status": run.status,
        "started": run.when,
        "seconds": run.card.get("seconds"),
        "saes": list(run.checkpoints()),
    }


@runs.command("show")
@RUN
@json_option()
def show(run: str, as_json: bool) -> None:
    """Show a run: its facts and its results."""
    from saehub.report.card import by_section, facts, limits, not_measured

    found = _find(run)
    if as_json:
        state = {"stages": found.stages(), "resume": found.resume}
        return out_json({"run": {**_row(found), **state, "card": found.card}, "measurements": [item.to_json() for item in found.measurements]})
    from saehub.cli import render

    out(str(found.path))
    for section, lines in by_section(fact for fact in facts(found) if fact.known):
        render.facts([(fact.name, fact.value) for fact in lines], title=section)
    if found.resume:
        render.facts(list(found.stages().items()), title=f"Stages ({found.status})")
        say(f"\nto go on: {clean(found.resume)}" + (" (unless it is at work)" if found.status == "unfinished" else ""))
    if not found.card and not found.measurements:
        return None
    for title, items in (("Not measured", not_measured(found)), ("Known limits", limits(found))):
        if items:
            render.facts([("", item) for item in items], title=title)
    out()
    render.results(found.measurements)
    page = found.path / "report.html"
    if page.is_file():
        say(f"\nreport:  {page}")


@runs.command("compare")
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="[RUN]", required=False)
@click.option("--map", "mapped", multiple=True, metavar="A=B", help="Compare SAE A of the first run with SAE B of the second (repeatable).")
@json_option()
def compare(first: str, second: str | None, mapped: tuple[str, ...], as_json: bool) -> None:
    """Compare two runs, or the SAEs of one, with each other.

    SAEs of one id belong together; others are paired where only they are alike (architecture, width, site, sparsity), or by --map.

    Numbers on the same text are compared by a paired bootstrap over its sequences. They are ranked only where the interval
    of the difference leaves out zero, adjusted (Holm) over the pairs of SAEs compared. Numbers on different text, or of
    different definitions, are not comparable.
    """
    from saehub.errors import UsageError
    from saehub.report import compare as comparison
    from saehub.report.pairing import pair

    left = _find(first)
    right = _find(second) if second is not None else left
    for run in (left, right):
        if not run.measurements:
            raise UsageError(
                f"{run.name} has no measurements (status: {run.status})",
                where=str(run.path),
                fix=f"finish it: {run.resume}" if run.resume else "compare a run that evaluates: evaluate: [{uses: native/core}]",
            )
    pairs: dict[str, str] = {}
    if second is None:
        if mapped:
            raise UsageError("--map pairs SAEs of two runs, and one is given", fix="saehub runs compare RUN RUN --map A=B")
        differences, remarks = comparison.within(left.measurements)
    else:
        pairs, how = pair(left, right, mapped)
        differences, remarks = comparison.compare(left.measurements, right.measurements, pairs)
        remarks = how + remarks
    if as_json:
        runs = [_row(left)] if second is None else [_row(left), _row(right)]
        return out_json({"runs": runs, "pairs": pairs, "differences": differences, "remarks": remarks})
    from saehub.cli import render

    names = (left.name, right.name) if left.name != right.name else ("first", "second")
    render.comparison(differences, names)
    for remark in remarks:
        say(clean(remark))
    if not differences:
        say(
            "the run has no two SAEs at one site; to compare it with another run: saehub runs compare RUN RUN"
            if second is None
            else "the two runs share no metric on SAEs that belong together; to say which do: --map A=B"
        )
        return None
    ranked = sum(item.verdict in ("a better", "b better") for item in differences)
    say(f"\n{ranked} of {len(differences)} differences are larger than their 95 % intervals allow by chance; the others are not ranked.")
    families = max((item.family for item in differences), default=1)
    if families > 1:
        say(f"p-values are adjusted (Holm) over up to {families} pairs of SAEs in each metric and dataset.")
    say("Errors are over evaluation text. They say nothing about how another training seed would come out.")


@runs.command("replay")
@click.argument("run", metavar="RUN_CARD")
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Run folder of the replay (default: .saehub/replays/RUN).",
)
@json_option("Print every event as one JSON line on stdout; the last line is the comparison.")
def replay(run: str, folder: Path | None, as_json: bool) -> int:
    """Run a finished run again, with nothing from the cache, and compare.

    Compared are the hashes of text and tensors, and every number.

    Exit code 0: all is bit-identical, or every number agrees within its error. 1: something differs.
    """
    from saehub.cli.replaying import replay as again

    return again(_find(run), folder, as_json=as_json)


@runs.command("gc")
@click.option("--yes", is_flag=True, help="Remove them; without it they are only listed.")
@click.option(
    "--keep",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="A run folder elsewhere whose results stay in the store (repeatable).",
)
@json_option()
def gc(yes: bool, keep: tuple[Path, ...], as_json: bool) -> None:
    """List what the store holds and no run folder needs; remove it with --yes.

    Run folders are never touched. A removed result is computed again when a recipe needs it.
    """
    from saehub.cli import clearing
    from saehub.pipeline.workspace import home

    base = home()
    entries = clearing.unused(base, [*_known(), *keep])
    if yes:
        clearing.remove(base, entries)
    total = sum(entry.bytes for entry in entries)
    if as_json:
        return out_json({"home": str(base), "removed": yes, "bytes": total, "entries": entries})
    if not entries:
        return say(f"nothing to remove: every result in {base / 'store'} belongs to a run")
    from saehub.cli import render

    render.table(
        ("kind", "what", "size", "why"),
        [(entry.kind, entry.path.name, numbers.size(entry.bytes), entry.why) for entry in entries],
        right=["size"],
    )
    say(
        f"\n{'removed' if yes else 'would free'} {numbers.size(total)} in {len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
        + ("" if yes else "; to remove them: saehub runs gc --yes")
    )
