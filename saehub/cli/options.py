"""Options that several commands share: `--json`, `--set`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from saehub.cli.talk import State

Command = TypeVar("Command", bound=Callable)


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value:
        ctx.ensure_object(State).json = True
    return value


def json_option(text: str = "Print one JSON object on stdout.") -> Callable[[Command], Command]:
    """`--json`, as the argument `as_json`; a failure is then also printed as JSON."""
    return click.option("--json", "as_json", is_flag=True, callback=_remember, is_eager=True, help=text)


def set_option(command: Command) -> Command:
    """`--set a.b=v`, repeatable, as the argument `overrides`."""
    return click.option(
        "--set",
        "overrides",
        metavar="A.B=V",
        multiple=True,
        help="Change one setting of the recipe (repeatable), such as train.native-k32.with.k=64.",
    )(command)
