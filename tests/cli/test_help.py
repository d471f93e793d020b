"""The help is stable, quick, and made of nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from saehub.cli import main

HELP = Path(__file__).parent / "help"
HEAVY = {
    "torch",
    "numpy",
    "rich",
    "pydantic",
    "pluggy",
    "yaml",
    "transformers",
    "datasets",
    "safetensors",
    "scipy",
    "jinja2",
    "saehub_native",
    "saehub_saelens",
    "sae_lens",
}


def commands(command: click.Command = main.cli, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """Every command by its words: {"": …, "recipe": …, "recipe ls": …}."""
    found = {" ".join(path): command}
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            found |= commands(command.get_command(ctx, name), (*path, name))
    return found


ALL = commands()


@pytest.mark.quick
@pytest.mark.parametrize("words", ALL, ids=[words or "saehub" for words in ALL])
def test_help_is_what_it_was(saehub, monkeypatch, words):
    """To accept a change: COLUMNS=100 saehub WORDS --help > tests/cli/help/WORDS.txt (spaces as dashes; saehub.txt for none)."""
    monkeypatch.setenv("COLUMNS", "100")
    said = saehub(*words.split(), "--help")
    assert said.code == 0 and said.err == ""
    assert said.out == (HELP / f"{words.replace(' ', '-') or 'saehub'}.txt").read_text(encoding="utf-8")


@pytest.mark.quick
def test_there_is_no_help_without_a_command():
    assert {path.stem for path in HELP.glob("*.txt")} == {words.replace(" ", "-") or "saehub" for words in ALL}


@pytest.mark.quick
def test_the_contract_of_the_design_is_there():
    words = {
        "recipe ls", "recipe show", "recipe cp", "recipe check", "recipe plan", "recipe run", "convert", "inspect", "verify", "eval",
        "plugins ls", "plugins check", "plugins new", "runs ls", "runs show", "runs compare", "runs replay", "runs gc", "doctor",
    }  # fmt: skip
    assert words <= set(ALL)
    options = {name: {option for param in ALL[name].params for option in param.opts} for name in words}
    assert {"--set", "--out", "--json"} <= options["recipe run"]
    assert {"--to", "--from", "--model", "--allow-lossy", "--keep-original", "--no-verify", "--push"} <= options["convert"]
    assert {"--with", "--model", "--data", "--json"} <= options["eval"]
    assert "--model" in options["verify"]
    listings = {
        "recipe ls",
        "plugins ls",
        "runs ls",
        "runs show",
        "runs compare",
        "runs gc",
        "inspect",
        "verify",
        "doctor",
        "recipe check",
        "recipe plan",
        "recipe show",
        "convert",
    }
    assert all("--json" in options[name] for name in listings)


@pytest.mark.quick
def test_the_lazy_table_says_what_the_commands_say():
    """`saehub --help` is printed without importing a command; its lines must still be theirs."""
    for name, (_, summary) in main.COMMANDS.items():
        assert ALL[name].get_short_help_str(limit=200) == summary, name


def imported(*args: str) -> set[str]:
    """Top-level modules that one call of the program imports."""
    code = f"import sys, json\nfrom saehub.cli import main\nmain.run({list(args)!r})\nsys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.quick
@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["recipe", "--help"],
        ["recipe", "run", "--help"],
        ["convert", "--help"],
        ["doctor", "--help"],
        ["nonsense"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(args):
    assert not imported(*args) & HEAVY


@pytest.mark.quick
@pytest.mark.parametrize(
    "args",
    [["recipe", "ls"], ["recipe", "check", "topk-llama"], ["plugins", "ls"], ["recipe", "show", "topk-llama"], ["runs", "ls"]],
    ids=" ".join,
)
def test_looking_imports_no_torch(args, home):
    assert not imported(*args) & {"torch", "transformers", "datasets", "sae_lens", "transformer_lens"}


@pytest.mark.quick
def test_plan_imports_no_torch(home):
    assert not imported("recipe", "plan", "topk-llama") & {"torch", "transformers", "datasets", "sae_lens"}


def test_help_takes_less_than_300_milliseconds():
    """The best of five processes, in CPU time: other work on the machine is not ours."""
    spent = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "saehub.cli.main", "--help"], capture_output=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        time.sleep(0.05)
    assert min(spent) < 0.3
