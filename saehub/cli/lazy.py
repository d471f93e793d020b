"""A table of command names, import paths and one-line summaries in; click groups that import a command only when it is called out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click

from saehub.errors import did_you_mean

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Group(click.Group):
    """A click group that suggests the nearest command, and lists commands in the order in which they were written."""

    def __init__(self, *args, **kwargs):
        kwargs["context_settings"] = {**SETTINGS, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)

    def command(self, *args, **kwargs):
        """Like click's, with our settings (`-h`) in every command."""
        kwargs["context_settings"] = {**SETTINGS, **(kwargs.get("context_settings") or {})}
        return super().command(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the source: the order of use."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        """As click does, but for the unknown command, which gets a suggestion from us under every version of click."""
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            raise click.UsageError(f"{ctx.command_path} has no command {name!r}{did_you_mean(name, self.list_commands(ctx))}", ctx=ctx)
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """A group whose commands are import paths: its help is printed from the table, so it imports nothing."""

    def __init__(self, *args, table: Mapping[str, tuple[str, str]] = (), **kwargs):
        """`table` maps a command's name to ("package.module:attribute", "One line for --help.")."""
        super().__init__(*args, **kwargs)
        self.table = dict(table)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        return getattr(import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.table.items()])
