"""The README in; proof that its commands parse, its recipe is valid and its Python runs out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
COMMANDS = [command[command.index("saehub ") :] for command in COMMANDS if "saehub " in command]


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command):
    from saehub.cli.main import cli

    words = shlex.split(command)[1:]
    node: click.Command = cli
    context = click.Context(cli, info_name="saehub")
    while isinstance(node, click.Group):
        name, node, words = node.resolve_command(context, words)
        context = click.Context(node, info_name=name, parent=context)
    node.make_context(node.name, words)  # a wrong option or a missing argument is a UsageError


@pytest.mark.quick
def test_the_recipe_of_the_readme_has_no_problem(tmp_path):
    from saehub.plugins import catalog
    from saehub.recipe import check

    (text,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    recipe, problems = check(path, (), catalog())
    assert [str(problem) for problem in problems if problem.severity == "error"] == []
    assert [entry.id for entry in recipe.train] == ["small", "wide", "across"]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    from saehub.checkpoint.format import save
    from saehub.testing.saes import random_sae

    monkeypatch.chdir(tmp_path)
    save(random_sae("topk"), "my-sae")
    first, second, plugin, suite = blocks("python")
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape and names["values"].shape[0] == 8
    assert (tmp_path / "copy-of-my-sae" / "saehub.json").is_file()
    compile(second, "README.md", "exec")  # trains for minutes and starts a worker: tests/pipeline and tests/checkpoint do what it shows
    registered: dict = {}
    exec(compile(plugin, "README.md", "exec"), registered)
    assert registered["saehub_trainers"]()[0].name == "topk"
    exec(compile(suite, "README.md", "exec"), names)
    assert callable(names["test_our_trainer"])


@pytest.mark.quick
def test_every_exit_code_and_variable_is_explained():
    from saehub import errors

    for code in {error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.SaehubError)}:
        assert f"\n| {code} | " in README
    for variable in ("SAEHUB_HOME", "SAEHUB_TRACE", "SAEHUB_DISABLE_PLUGINS", "SAEHUB_STRICT_PLUGINS"):
        assert f"`{variable}" in README


@pytest.mark.quick
def test_every_built_in_architecture_and_site_is_named():
    from saehub.checkpoint.registry import BUILT_IN
    from saehub.sites import KINDS

    for word in [*(entry.name for entry in BUILT_IN), *KINDS]:
        assert re.search(rf"\b{word}\b", README), word
