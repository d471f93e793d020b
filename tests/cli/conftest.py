"""The command line in this process, a home of its own, and invented runs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Said:
    """What one call left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as one JSON object."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """stdout as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture()
def home(tmp_path, monkeypatch):
    """SAEHUB_HOME, empty; and an environment in which nothing is coloured or offline by chance."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "CI", "SAEHUB_TRACE", "SAEHUB_DISABLE_PLUGINS", "SAEHUB_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAEHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


@pytest.fixture()
def saehub(home, capsys):
    """`saehub("recipe", "ls")` runs the command line and returns what it said."""
    from saehub.cli import main

    def call(*args: str) -> Said:
        code = main.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def fake_run():
    """The module `tests/report/fake_run.py`."""
    spec = importlib.util.spec_from_file_location("fake_run", Path(__file__).parents[1] / "report" / "fake_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture()
def two_runs(home, fake_run):
    """Two finished runs in the home; the second one is worse by 0.05 in FVU."""
    return [fake_run.write(home / "runs" / "topk-llama-1a2b"), fake_run.write(home / "runs" / "topk-wide-9f8e", ("wide-k32",), worse=0.05)]
