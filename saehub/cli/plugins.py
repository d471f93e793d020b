"""`saehub plugins …`: installed plugins in; what they provide, and what is wrong with them, out."""

from __future__ import annotations

from pathlib import Path

import click

from saehub.cli.lazy import Group
from saehub.cli.options import json_option, not_yet
from saehub.cli.talk import clean, out_json, say, style


@click.group(cls=Group)
def plugins() -> None:
    """List the plugins and what they provide."""


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
        [(row["name"], f"{row['distribution']} {row['version']}".strip(), row["status"], row["error"] or _provides(row)) for row in rows],
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
@click.argument("name")
def check(name: str) -> None:
    """Run the conformance suite on a plugin's components (no component does this yet)."""
    raise not_yet(
        "plugins check",
        f"subclass the suites of saehub.testing in the plugin's own tests; `saehub plugins ls --trace` shows whether {name} loads",
    )


@plugins.command("new")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def new(directory: Path) -> None:
    """Start a plugin from the template (no component does this yet)."""
    raise not_yet(
        "plugins new",
        "write a module with @saehub.hookimpl functions and an entry point in the group saehub.plugins;\n"
        "each docstring in saehub/hookspecs.py is a complete one",
    )
