"""plugins/README.md in; the plugin that it describes, written out, checked by the conformance kit and run in its recipe, out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "plugins" / "README.md").read_text(encoding="utf-8")
FIRST = PAGE[: PAGE.index("## The other kinds")]


def blocks(language: str, text: str = FIRST) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The tutorial's files, with the metadata that installing them would leave."""
    site = tmp_path_factory.mktemp("site")
    package = site / "saehub_house"
    package.mkdir()
    for name, code in zip(("__init__", "config", "train"), blocks("python"), strict=True):
        (package / f"{name}.py").write_text(code, encoding="utf-8")
    info = site / "saehub_house-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saehub-house\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[saehub.plugins]\nhouse = saehub_house\n")
    return site


def saehub(house: Path, *words: object) -> subprocess.CompletedProcess:
    """The command, in a process that sees the plugin."""
    path = os.pathsep.join(filter(None, [str(house), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "SAEHUB_HOME": str(house / "home")}
    command = [sys.executable, "-m", "saehub.cli.main", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.quick
def test_it_is_at_most_fifty_lines_of_work():
    code = [line for block in blocks("python")[:1] + blocks("python")[2:] for line in block.splitlines() if line.strip()]
    assert len(code) <= 50, len(code)


@pytest.mark.quick
def test_the_packaging_that_it_shows_registers_it():
    import tomllib

    (text,) = blocks("toml")
    assert tomllib.loads(text)["project"]["entry-points"]["saehub.plugins"] == {"house": "saehub_house"}


def test_the_conformance_kit_accepts_it(house):
    done = saehub(house, "plugins", "check", "house", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], done.stdout
    (component,) = report["components"]
    assert component["component"] == "house/relu" and len(component["checks"]) >= 12


def test_its_recipe_runs_and_the_export_is_certified(house):
    (text,) = blocks("yaml")
    (house / "house.yaml").write_text(text, encoding="utf-8")
    done = saehub(house, "recipe", "run", house / "house.yaml", "--out", house / "run", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    certificate = json.loads((house / "run" / "exports" / "saelens" / "relu" / "conversion.json").read_text())
    assert certificate["outcome"] == "verified by the target's library"
    rows = {row["metric"]: row for row in json.loads((house / "run" / "results.json").read_text())["measurements"]}
    assert 0 < rows["fvu"]["value"] < 1 and rows["l0"]["value"] > 1


@pytest.mark.quick
def test_every_kind_and_every_hook_is_in_the_table():
    from saehub.api import KINDS
    from saehub.hookspecs import HOOKS

    others = ("architecture", "recipe", "results")
    for word in (*KINDS, *others):
        assert f"\n| {word} | " in PAGE
    assert len(HOOKS) == len(KINDS) + len(others)
