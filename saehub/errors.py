"""What went wrong, where, why and how to fix it, in; one exception that the command line prints without a traceback and exits with a code, out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SaehubError(Exception):
    """An error that a user can act on.

    `what` restates the input, `where` is a file:line:column, a stage or a component, `why` is observed against expected, `fix` is a
    command or an edit, and `said` holds a wrapped library's own words, verbatim.
    """

    exit_code = 4

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None, said: str | None = None):
        super().__init__(what)
        self.what, self.where, self.why, self.fix, self.said = what, where, why, fix, said

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"{label}: {text}" for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix)) if text]
        if self.said:
            lines.append("its own words:\n" + "\n".join("  | " + line for line in self.said.splitlines()))
        return "\n".join(lines)

    def to_json(self) -> dict:
        """The same error as plain data: what a worker process or `--json` sends."""
        return {"type": type(self).__name__, "what": self.what, "where": self.where, "why": self.why, "fix": self.fix, "said": self.said}


class CheckFailed(SaehubError):
    """A check, verification or certificate came out negative (exit code 1)."""

    exit_code = 1


class UsageError(SaehubError):
    """A wrong argument, name or path (exit code 2)."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with problems; `problems` holds one `saehub.recipe.Problem` each, all of them at once (exit code 2)."""

    def __init__(self, what: str, problems: Iterable = (), **parts):
        super().__init__(what, **parts)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([*(str(problem) for problem in self.problems), super().__str__()])


class MissingDependency(SaehubError):
    """A component whose library is not installed (exit code 3)."""

    exit_code = 3


class StageFailed(SaehubError):
    """A stage of a run that could not finish; finished stages stay valid (exit code 4)."""


class FormatError(SaehubError):
    """A file that is not what it says: a truncated tensor, a wrong shape, an unknown version (exit code 1; in a stage of a run, 4)."""

    exit_code = 1


class NeedsInput(SaehubError):
    """`decode` without `like=` where the architecture needs the input (run-time norm or skip path)."""


class Interrupted(SaehubError):
    """Ctrl-C or SIGTERM; the state is saved and the same command resumes (exit code 130)."""

    exit_code = 130


class Caution(UserWarning):
    """Something about a file that was read which its user should know (issued by `warnings.warn`; the command line prints it as one line)."""


ERRORS = {kind.__name__: kind for kind in (SaehubError, CheckFailed, UsageError, MissingDependency, StageFailed, FormatError, NeedsInput, Interrupted)}


def from_json(data: dict) -> SaehubError:
    """Rebuild the error that `SaehubError.to_json` wrote (a worker's failure becomes ours)."""
    kind = ERRORS.get(data.get("type", ""), StageFailed)
    return kind(data["what"], **{part: data.get(part) for part in ("where", "why", "fix", "said")})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'expansion'?"`, or the empty string where nothing known is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
