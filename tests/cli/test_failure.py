"""Every way to fail: the exit code, the words, and no traceback unless it is asked for."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import click
import pytest

from saehub import errors
from saehub.cli import failure, main
from saehub.recipe import Problem

pytestmark = pytest.mark.quick
CODES = {
    errors.SaehubError: 4, errors.CheckFailed: 1, errors.UsageError: 2, errors.RecipeError: 2, errors.MissingDependency: 3, errors.StageFailed: 4,
    errors.FormatError: 1, errors.NeedsInput: 4, errors.Interrupted: 130,
}  # fmt: skip


@pytest.fixture()
def broken(saehub, monkeypatch):
    """`broken(error, "--json")`: what `saehub doctor` says when `error` is raised inside it."""
    from saehub.cli import doctor

    def call(error: BaseException, *args: str):
        def raise_it() -> None:
            raise error

        monkeypatch.setattr(doctor, "_guarded", lambda look: raise_it())
        return saehub("doctor", *args)

    return call


def test_every_kind_of_error_is_in_this_test():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert {kind for kind in below(errors.SaehubError) if kind.__module__ == "saehub.errors"} == set(CODES)


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_exit_code_and_words(broken, kind):
    said = broken(
        kind("what it is", where="here.yaml:3:4", why="32 expected, 31 found", fix="saehub doctor", said="ValueError: no\nreally")
    )
    assert said.code == CODES[kind]
    assert said.out == ""
    assert said.err == (
        f"{'interrupted' if kind is errors.Interrupted else 'error'}: what it is\nwhere: here.yaml:3:4\n  why: 32 expected, 31 found\n  fix: saehub doctor\n said: | ValueError: no\n       | really\n"
    )


def test_only_what_is_known_is_said(broken):
    assert broken(errors.UsageError("what")).err == "error: what\n"


def test_several_lines_stay_in_their_column(broken):
    assert broken(errors.UsageError("a\nb", fix="c\nd")).err == "error: a\n       b\n  fix: c\n       d\n"


def test_as_json_it_is_also_data(broken):
    said = broken(errors.StageFailed("what", where="train/a", why="y", fix="z", said="w"), "--json")
    assert said.data == {
        "schema": 1,
        "error": {"type": "StageFailed", "what": "what", "where": "train/a", "why": "y", "fix": "z", "said": "w", "exit_code": 4},
    }
    assert said.err.startswith("error: what\n")


def test_problems_come_first_and_all_of_them(broken):
    problems = [
        Problem("bad.yaml", 6, 8, "train.a.with.k", "should be an integer, got '32'", "k: 32", '    k: "32"'),
        Problem("--set a.b=1", 0, 0, "a.b", "unknown key 'a'"),
        Problem("bad.yaml", 9, 1, "", "split twice", None, "x", "warning"),
    ]
    said = broken(errors.RecipeError("2 problems in bad.yaml", problems, fix="edit it"), "--json")
    assert said.code == 2
    assert said.err == (
        "bad.yaml:6:8: train.a.with.k: should be an integer, got '32'\n"
        '    6 |     k: "32"\n'
        "      |        ^\n"
        "      = k: 32\n"
        "--set a.b=1: a.b: unknown key 'a'\n"
        "bad.yaml:9:1: warning: split twice\n"
        "    9 | x\n"
        "      | ^\n"
        "error: 2 problems in bad.yaml\n"
        "  fix: edit it\n"
    )
    assert [problem["line"] for problem in said.data["error"]["problems"]] == [6, 0, 9]
    assert set(said.data["error"]["problems"][0]) == {"file", "line", "column", "path", "message", "hint", "severity", "source_line"}


def test_problems_of_a_plan_have_the_same_keys():
    from saehub.pipeline.plan import PlanProblem

    data = failure.problem_to_json(PlanProblem("train[0].with.k", "k is larger than d_sae", "a smaller k"))
    assert (data["path"], data["message"], data["hint"], data["severity"], data["line"]) == (
        "train[0].with.k",
        "k is larger than d_sae",
        "a smaller k",
        "error",
        None,
    )


def test_an_unexpected_exception_is_one_message_and_no_traceback(broken):
    said = broken(ZeroDivisionError("division by zero"))
    assert said.code == 4
    what, where, why, fix = said.err.splitlines()
    assert what == "error: unexpected ZeroDivisionError: division by zero"
    assert where.startswith("where: ") and "test_failure.py:" in where and where.endswith(" in raise_it")
    assert why == "  why: this is a bug in saehub or in a plugin, not in what you typed"
    assert fix == "  fix: SAEHUB_TRACE=1 with the same command prints the traceback; please report it"
    assert "Traceback" not in said.err


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), errors.UsageError("x")], ids=["bug", "ours"])
def test_the_traceback_comes_when_asked_for(broken, monkeypatch, error):
    monkeypatch.setenv("SAEHUB_TRACE", "1")
    said = broken(error)
    assert said.err.startswith("Traceback (most recent call last):")
    assert "in raise_it" in said.err and "\nerror: " in said.err


def test_a_missing_package_is_not_a_bug(broken):
    said = broken(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert said.code == 3
    assert "error: the Python package 'torch' is not installed" in said.err and "fix: pip install torch" in said.err
    assert broken(ModuleNotFoundError("No module named 'saehub.x'", name="saehub.x")).code == 4


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EMFILE, "too many open files"),
    ],
)
def test_what_the_system_refuses_is_not_a_bug(broken, number, words):
    said = broken(OSError(number, os.strerror(number), "/data/x"))
    assert said.code == 4
    assert words in said.err and "/data/x" in said.err and "bug" not in said.err and "fix: " in said.err


def test_interrupts(broken):
    assert broken(KeyboardInterrupt()).code == 130
    assert "interrupted" in broken(KeyboardInterrupt()).err
    said = broken(errors.Interrupted("stopped; the state is saved", fix="the same command goes on"))
    assert said.code == 130 and "the same command goes on" in said.err


def test_names_cannot_steer_the_terminal(broken):
    said = broken(errors.UsageError("\x1b[2J\x07name\u202e"))
    assert "\x1b" not in said.err and "\x07" not in said.err and "\\x1b[2J\\x07name\\u202e" in said.err


# ---------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["recpie"], "saehub has no command 'recpie'; did you mean 'recipe'?"),
        (["recipe", "plna"], "saehub recipe has no command 'plna'; did you mean 'plan'?"),
        (["recipe", "xyzzy"], "saehub recipe has no command 'xyzzy'"),
        (["recipe", "ls", "--jsn"], "--json"),
        (["recipe", "run"], "missing argument 'FILE|NAME'"),
        (["convert", "a", "b"], "missing option '--to'"),
        (["eval", "x", "--with", "y", "--tokens", "many"], "'many' is not a valid integer"),
        (["--nonsense"], "--nonsense"),
        (["runs", "compare"], "missing argument 'RUN'"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_code_2_with_a_suggestion(saehub, args, words):
    said = saehub(*args)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ") and words in said.err and "--help" in said.err
    assert "Traceback" not in said.err and "Usage:" not in said.err


def test_no_arguments_is_help(saehub):
    said = saehub()
    assert "Start here:" in said.out + said.err


def test_version(saehub):
    import saehub as package

    assert saehub("--version").out == f"saehub {package.__version__}\n"


def test_a_command_that_returns_a_code_exits_with_it(monkeypatch):
    monkeypatch.setitem(main.cli.table, "doctor", ("x:y", "z"))
    monkeypatch.setattr(main.cli, "get_command", lambda ctx, name: click.Command(name, callback=lambda: 1))
    assert main.run(["doctor"]) == 1


# ---------------------------------------------------------------- a process of its own


def program(*args: str, **more):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **more.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "saehub.cli.main", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **more
    )


def test_a_reader_that_goes_away_is_no_error():
    """`saehub … --json | head -0`: quiet, and with the code that a shell expects of a closed pipe."""
    process = program("plugins", "ls", "--json")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141
    assert err == ""


def test_ctrl_c_is_130():
    code = (
        "import signal, os, threading, time\nfrom saehub.cli import main, doctor\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit an ignored one
        "doctor._guarded = lambda look: (os.kill(os.getpid(), signal.SIGINT), time.sleep(20))\nmain.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr


def test_kill_ends_a_conversion_as_ctrl_c_does(tmp_path):
    """`kill PID` while both sides run: exit code 130, and nothing is left of what was being written."""
    code = (
        "import os, signal, sys, time\nfrom saehub.cli import main\nfrom saehub.checkpoint import convert\nfrom saehub.checkpoint.format import save\n"
        "from saehub.testing.saes import random_sae\n"
        "convert._certify = lambda *a: (print(*os.listdir()), os.kill(os.getpid(), signal.SIGTERM), time.sleep(20))\n"
        "save(random_sae('relu'), 'source')\nmain.main(['convert', 'source', 'target', '--to', 'saehub'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 130 and "Traceback" not in done.stderr and "interrupted" in done.stderr, done.stderr
    assert ".target." in done.stdout and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_terminal_without_unicode_gets_question_marks(tmp_path, fake_run):
    fake_run.write(tmp_path / "runs" / "a")
    done = program("runs", "show", "a", env={"PYTHONIOENCODING": "ascii", "SAEHUB_HOME": str(tmp_path), "COLUMNS": "160"})
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert "0.1293 ? 0.0021" in out


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=["colour", "NO_COLOR", "dumb"]
)
def test_colour_on_a_terminal_alone(env, coloured):
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "saehub.cli.main", "recpie"], stderr=child, stdout=subprocess.DEVNULL, env={**base, "TERM": "xterm", **env}
    )
    process.wait(60)
    os.close(child)
    words = os.read(parent, 4096).decode()
    os.close(parent)
    assert ("\x1b[" in words) == coloured
    assert "did you mean" in words


def test_every_json_error_of_a_process_is_one_object(tmp_path):
    done = program("inspect", str(tmp_path / "nothing"), "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2
    assert json.loads(out)["error"]["type"] == "UsageError" and "error: " in err


assert signal.SIGPIPE + 128 == failure.READER_GONE


@pytest.mark.parametrize("words", [[], ["recipe"], ["runs"]])
def test_a_command_alone_gets_its_help_and_no_error(saehub, words):
    said = saehub(*words)
    assert said.code == 2 and said.out == "" and said.err.startswith("Usage: saehub") and "error" not in said.err.partition("Exit codes")[0]
