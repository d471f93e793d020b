"""Any exception in; what, where, why and fix on stderr, and an exit code, out. A traceback only with SAEHUB_TRACE=1."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import click

from saehub.cli.talk import State, clean, out_json, out_json_line, plain, say, style
from saehub.errors import Interrupted, MissingDependency, RecipeError, SaehubError, StageFailed, UsageError

OK, FAILED, USAGE, MISSING, STAGE, INTERRUPTED = 0, 1, 2, 3, 4, 130
READER_GONE = 141
"""128 + SIGPIPE: what a shell expects of a program whose reader went away (`saehub … | head`)."""


class ReaderGone(Exception):
    """Nobody reads our output any more. (Not an OSError: click would turn that into an exit code of its own.)"""


def tell(error: BaseException, state: State) -> int:
    """Print `error` for a person (and as JSON where `--json` was given) and return the exit code."""
    if isinstance(error, (ReaderGone, BrokenPipeError)):
        return READER_GONE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else (OK if error.code is None else STAGE)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        say(error.format_message())  # nothing is wrong: somebody asks what there is
        return USAGE
    if os.environ.get("SAEHUB_TRACE") not in (None, "", "0"):
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        say(style("interrupted", fg="yellow") + ": what was finished is kept; the same command goes on from there")
        return INTERRUPTED
    known = as_known(error)
    show(known)
    if state.json:
        with suppress(BrokenPipeError):
            if state.lines:
                out_json_line({"kind": "error", "error": to_json(known)})
            else:
                out_json({"error": to_json(known)})
    return known.exit_code


def as_known(error: BaseException) -> SaehubError:
    """The error itself if it is ours; else ours in place of click's, the system's, or a bug's."""
    if isinstance(error, SaehubError):
        return error
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "saehub"
        words = error.format_message().strip().rstrip(".")
        return UsageError(words[:1].lower() + words[1:], fix=f"{path} --help")
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message(), fix="saehub --help")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("saehub"):
        package = error.name.partition(".")[0]
        return MissingDependency(
            f"the Python package {package!r} is not installed", where=frame(error), fix=f"pip install {package.replace('_', '-')}"
        )
    if isinstance(error, OSError) and error.errno in SYSTEM:
        why, fix = SYSTEM[error.errno]
        what = f"the operating system refused {error.filename!r}" if error.filename else "the operating system refused"
        return StageFailed(what, where=frame(error), why=why, fix=fix, said=error.strerror)
    return StageFailed(
        f"unexpected {type(error).__name__}: {error}" if str(error) else f"unexpected {type(error).__name__}",
        where=frame(error),
        why="this is a bug in saehub or in a plugin, not in what you typed",
        fix="SAEHUB_TRACE=1 with the same command prints the traceback; please report it",
    )


SYSTEM = {
    errno.ENOSPC: (
        "the disk is full",
        "free some space (`saehub runs gc` lists what can go), then run the same command again: it goes on from what is finished",
    ),
    errno.EDQUOT: ("the disk quota is used up", "free some space (`saehub runs gc` lists what can go), then run the same command again"),
    errno.EACCES: ("no permission", "choose a folder that you may write: SAEHUB_HOME=DIR, or --out DIR"),
    errno.EPERM: ("not permitted", "choose a folder that you may write: SAEHUB_HOME=DIR, or --out DIR"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write: SAEHUB_HOME=DIR, or --out DIR"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n 4096"),
}
"""What the operating system says when it is nobody's bug."""


def frame(error: BaseException) -> str | None:
    """`file:line in function` of the innermost frame, the file as it is imported (`saehub/…`)."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return None
    parts = Path(frames[-1].filename).parts
    start = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] in ("site-packages", "adapters", "plugins")), None)
    if start is None:
        start = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] == "saehub" and i + 1 < len(parts)), len(parts) - 1) - 1
    return f"{'/'.join(parts[start + 1 :])}:{frames[-1].lineno} in {frames[-1].name}"


def show(error: SaehubError) -> None:
    """The error in words on stderr: all problems of a recipe first, then what, where, why, fix and the library's own words."""
    for problem in getattr(error, "problems", ()):
        show_problem(problem)
    label = style("interrupted", fg="yellow", bold=True) if isinstance(error, Interrupted) else style("error", fg="red", bold=True)
    say(f"{label}: " + _hang(clean(error.what), 7))
    for label, text in (("where", error.where), ("why", error.why), ("fix", error.fix)):
        if text:
            say(style(f"{label:>5}", bold=label == "fix", dim=label != "fix") + ": " + _hang(clean(text), 7))
    if error.said:
        say(style(" said", dim=True) + ": " + "\n       ".join(f"| {line}" for line in clean(error.said).splitlines()))


def show_problem(problem: object, err: bool = True) -> None:
    """One problem of a recipe, as `Problem.__str__` lays it out; its first line coloured by severity."""
    stream = sys.stderr if err else sys.stdout
    first, *rest = clean(problem).splitlines() or [""]
    looks = {"warning": "yellow", "missing": "yellow"}.get(getattr(problem, "severity", "error"), "red")
    click.echo("\n".join([style(first, stream, fg=looks), *rest]), err=err)


def to_json(error: SaehubError) -> dict:
    """`error` as the object that `--json` prints; problems of a recipe as a list."""
    data = {**error.to_json(), "exit_code": error.exit_code}
    if isinstance(error, RecipeError):
        data["problems"] = [problem_to_json(problem) for problem in error.problems]
    if hasattr(getattr(error, "certificate", None), "to_json"):
        data["certificate"] = error.certificate.to_json()
    return data


def problem_to_json(problem: object) -> dict:
    """A Problem of a recipe, or of its plan, as plain data; the same keys for both."""
    names = ("file", "line", "column", "path", "message", "hint", "severity", "source_line")
    data = {name: plain(getattr(problem, name, None)) for name in names}
    data["hint"] = data["hint"] or getattr(problem, "fix", None)
    data["severity"] = data["severity"] or "error"
    return data


def _hang(text: str, indent: int) -> str:
    return text.replace("\n", "\n" + " " * indent)
