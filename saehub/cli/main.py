"""`sys.argv` in; one command run, its failure told in words, and an exit code out. Imports click and nothing heavier."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from saehub import __version__
from saehub.cli import failure
from saehub.cli.lazy import LazyGroup
from saehub.cli.talk import State, clean, say, style

COMMANDS = {
    "recipe": ("saehub.cli.recipe:recipe", "List, copy, check, plan and run recipes."),
    "convert": ("saehub.cli.checkpoint:convert", "Write a checkpoint in another library's format, with a certificate."),
    "inspect": ("saehub.cli.checkpoint:inspect", "Say what a checkpoint is: architecture, shapes, site, provenance."),
    "verify": ("saehub.cli.checkpoint:verify", "Prove that a checkpoint still is what it says."),
    "eval": ("saehub.cli.evaluate:evaluate", "Measure one checkpoint with one evaluator."),
    "plugins": ("saehub.cli.plugins:plugins", "List, check and start plugins."),
    "runs": ("saehub.cli.runs:runs", "List, show, compare and replay runs; clear the store."),
    "doctor": ("saehub.cli.doctor:doctor", "Check this machine, and say what to do next."),
}


class Program(LazyGroup):
    """The root command, which gives a closed pipe a name of its own."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _named():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _named():
            return super().invoke(ctx)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise failure.ReaderGone from error


@click.command(
    cls=Program,
    table=COMMANDS,
    epilog="""\b
    Exit codes:
      0 ok                                  3 a library is missing
      1 a check or a verification failed    4 a stage failed
      2 wrong usage, or a faulty recipe     130 interrupted, state saved

    \b
    Environment:
      SAEHUB_HOME=DIR    where runs and the store live (default: ./.saehub)
      SAEHUB_TRACE=1     add the traceback to an error
      NO_COLOR=1         no colour""",
)
@click.version_option(__version__, "--version", prog_name="saehub", message="%(prog)s %(version)s", help="Print the version.")
def cli() -> None:
    """Train, evaluate, convert and export sparse autoencoders with any library.

    \b
    Start here:
      saehub recipe run topk-llama     train, evaluate and export on the model in the box
      saehub recipe ls                 what else there is
      saehub doctor                    check this machine
    """


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: runs `argv` (default: the process's own) and exits."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot write "±" gets "?", not a crash
            stream.reconfigure(errors="replace")
    _print_cautions_plainly()
    # `kill PID` ends a command as Ctrl-C does: what it began to write is removed. (A run saves its state first.)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # torch's OpenMP threads spin for milliseconds after every operation, on cores that extraction and trainers could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone; keep Python's own flush at exit from complaining
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or failure.READER_GONE
    sys.exit(code)


def _print_cautions_plainly() -> None:
    """saehub's own warnings as one line, without the source line that issued them; others as ever."""
    import warnings

    from saehub.errors import Caution

    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Caution):
            say(style("caution", fg="yellow") + f": {clean(message)}")
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every failure is told on stderr."""
    state = State(command=shlex.join(["saehub", *(sys.argv[1:] if argv is None else argv)]))
    try:
        code = cli.main(args=argv, prog_name="saehub", standalone_mode=False, obj=state)
    except BaseException as error:  # noqa: BLE001  KeyboardInterrupt and SystemExit have exit codes, too
        return failure.tell(error, state)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
