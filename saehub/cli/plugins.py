"""`saehub plugins …`: installed plugins in; what they provide, what is wrong with them, and which promises they keep, out."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from saehub.cli.lazy import Group
from saehub.cli.options import json_option
from saehub.cli.talk import clean, out_json, say, style


@click.group(cls=Group)
def plugins() -> None:
    """List, check and start plugins."""


@plugins.command("ls")
@click.option("--trace", is_flag=True, help="Add the traceback of every broken plugin.")
@json_option()
def ls(trace: bool, as_json: bool) -> None:
    """List plugins, their components, and what each one needs; a broken plugin is a red row."""
    from saehub.plugins import catalog

    known = catalog()
    rows = [_row(known, row, trace) for row in known.rows()]
    if as_json:
        return out_json({"plugins": rows})
    from saehub.cli import render

    render.table(
        ("plugin", "distribution", "status", "provides"),
        [
            (
                row["name"],
                f"{row['distribution']} {row['version']}".strip(),
                row["status"] + (", slow" if row["warning"] else ""),
                row["error"] or _provides(row),
            )
            for row in rows
        ],
    )
    components = [item for row in rows for item in row["components"]]
    if components:
        say()
        render.table(
            ("component", "kind", "status", "library", "what it does"),
            [
                (
                    item["address"],
                    item["kind"],
                    "ok" if not item["missing"] else f"missing {', '.join(item['missing'])}",
                    ", ".join(f"{name} {version}" for name, version in item["libraries"].items()) or item["install"] or "-",
                    item["summary"],
                )
                for item in components
            ],
        )
    for fix in dict.fromkeys(item["install"] for item in components if item["install"]):
        say(f"to install what is missing: {fix}")
    for row in rows:
        if row["warning"]:
            say(style(f"{row['name']} is slow: ", fg="red") + clean(row["warning"]))
    for row in rows:
        if trace and row["trace"]:
            say(style(f"\n{row['name']}", fg="red") + "\n" + clean(row["trace"]).rstrip())
        elif row["status"] == "broken":
            say(f"why {row['name']} is broken: saehub plugins ls --trace")
            break


def _row(known: object, row: object, trace: bool) -> dict:
    return {
        "name": row.plugin,
        "distribution": row.distribution,
        "version": row.version,
        "status": row.status,
        "error": row.error,
        "trace": row.trace if trace else None,
        "warning": row.warning,
        "components": [_component(known, item) for item in row.components],
        "architectures": [{"name": item.name, "summary": item.entry.summary} for item in row.architectures],
        "recipes": [str(path) for path in row.recipes],
    }


def _component(known: object, item: object) -> dict:
    from saehub.errors import MissingDependency

    missing, install = known.missing(item), None
    try:
        known.require(item)
    except MissingDependency as error:
        install = error.fix
    entry = item.entry
    return {
        "address": item.address,
        "kind": item.kind,
        "summary": entry.summary,
        "needs": list(entry.needs),
        "requires": list(entry.requires),
        "libraries": {name: version for name, version in item.library_versions().items() if name != item.distribution},
        "missing": missing,
        "install": install,
    }


def _provides(row: dict) -> str:
    counts: dict[str, int] = {}
    for item in row["components"]:
        counts[item["kind"]] = counts.get(item["kind"], 0) + 1
    counts |= {name: len(row[f"{name}s"]) for name in ("architecture", "recipe") if row[f"{name}s"]}
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items()) or "nothing"


@plugins.command("check")
@click.argument("name", metavar="NAME")
@click.option("--set", "settings", metavar="COMPONENT.KEY=V", multiple=True, help="A setting to try a component with (repeatable), such as topk.k=4.")
@click.option("--folder", "folders", metavar="COMPONENT=PATH", multiple=True, help="A published checkpoint for an exporter that only reads (repeatable).")
@json_option()
def check(name: str, settings: tuple[str, ...], folders: tuple[str, ...], as_json: bool) -> int:
    """Run the conformance suites of saehub.testing on every component of an installed plugin."""
    from saehub.cli import render
    from saehub.cli.failure import FAILED, OK
    from saehub.testing.plugin import check_plugin

    reports = []
    for report in check_plugin(name, _settings(settings), _folders(folders), started=lambda item: say(f"{item.kind} {item.address} …")):
        reports.append(report)
        if not as_json:
            rows = [("ok" if row.ok else "FAIL", row.name, row.detail) for row in report.checks]
            say(style(report.component, bold=True))
            render.table(("", "promise", "seen"), rows)
    if as_json:
        out_json({"ok": all(report.ok for report in reports), "components": [report.to_json() for report in reports]})
    broken = [report.component for report in reports if not report.ok]
    count = f"{len(reports)} component{'s' if len(reports) != 1 else ''}"
    say(f"{count}, " + (f"{len(broken)} break{'s' if len(broken) == 1 else ''} a promise: {', '.join(broken)}" if broken else "every promise kept"))
    return FAILED if broken else OK


def _settings(texts: tuple[str, ...]) -> dict[str, dict]:
    """`topk.k=4` as {"topk": {"k": 4}}; a component may be an address, `native/topk.k=4`."""
    from saehub.cli.evaluate import setting
    from saehub.errors import UsageError

    found: dict[str, dict] = {}
    form = "COMPONENT.KEY=VALUE, such as --set topk.k=4"
    for text in texts:
        path, value = setting(text, form)
        component, dot, key = path.partition(".")
        if not dot or not key:
            raise UsageError(f"--set {text} names no component", fix=f"--set {form}")
        found.setdefault(component, {})[key] = value
    return found


def _folders(texts: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    from saehub.errors import UsageError

    found: dict[str, dict[str, Path]] = {}
    for text in texts:
        component, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            what = f"--folder {text}: {path or 'the path'} does not exist" if equals else f"--folder {text} names no component"
            raise UsageError(what, fix="--folder COMPONENT=PATH, such as --folder openai=checkpoints/6.pt")
        found.setdefault(component, {})[Path(path).name] = Path(path)
    return found


@plugins.command("new")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Of the distribution, such as saehub-something (default: the folder's).")
@click.option("--kinds", default="trainer,extractor,evaluator,exporter", show_default=True, metavar="A,B", help="Kinds of components to start with.")
def new(directory: Path, name: str | None, kinds: str) -> None:
    """Start a plugin of one's own: a distribution with one working component of each kind, and its tests."""
    from saehub.cli.skeleton import write_plugin

    written = write_plugin(directory, name or directory.absolute().name, [kind.strip() for kind in kinds.split(",") if kind.strip()])
    for path in written:
        click.echo(path)
    say(f"\nnext: cd {shlex.quote(str(directory))} && uv run pytest")
    say("then replace what is inside; plugins/README.md of saehub is the tutorial")
