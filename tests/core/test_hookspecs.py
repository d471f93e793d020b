"""The hooks' docstrings in; proof that each example is a complete plugin that registers, out."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from pathlib import Path

import pytest

from saehub import hookspecs
from saehub.plugins import PluginRow, _register

pytestmark = pytest.mark.quick


def example(hook: str) -> str:
    """The code after `Example:` in a hook's docstring."""
    text = inspect.getdoc(getattr(hookspecs, hook))
    _, found, code = text.partition("Example:\n")
    assert found, f"{hook} has no Example"
    return textwrap.dedent(code)


def test_every_specified_hook_is_listed():
    specified = {name for name, value in vars(hookspecs).items() if hasattr(value, "saehub_spec")}
    assert specified == set(hookspecs.HOOKS)


# Every hook by name, with what its own example registers.
REGISTERED = {
    "saehub_extractors": ("extractor", "hf"),
    "saehub_trainers": ("trainer", "topk"),
    "saehub_evaluators": ("evaluator", "l0"),
    "saehub_exporters": ("exporter", "house"),
    "saehub_results": ("results", "house-json"),
    "saehub_architectures": ("architecture", "softcap"),
    "saehub_recipes": ("recipe", "soup"),
}


def test_every_hook_has_a_row_in_this_test():
    assert set(REGISTERED) == set(hookspecs.HOOKS)


@pytest.mark.parametrize("hook", hookspecs.HOOKS)
def test_the_example_of_each_hook_is_a_complete_plugin(hook, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "soup.yaml").write_text("saehub: 1\n")
    module = types.ModuleType("example_plugin")
    module.__file__ = str(tmp_path / "__init__.py")
    exec(compile(example(hook), hook, "exec"), vars(module))
    row = PluginRow("example", "saehub-example", "1.0")
    _register(row, lambda: module)
    found = [(item.kind, item.name) for item in (*row.components, *row.architectures)] + [("recipe", path.stem) for path in row.recipes]
    assert found == [REGISTERED[hook]]


@pytest.mark.parametrize("hook", hookspecs.HOOKS)
def test_each_hook_says_since_when_it_exists(hook):
    assert re.search(r"\.\. versionadded:: \d+\.\d+", inspect.getdoc(getattr(hookspecs, hook)))


@pytest.mark.parametrize("hook", hookspecs.HOOKS)
def test_each_hook_is_documented_in_the_readme(hook):
    assert f"`{hook}`" in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
