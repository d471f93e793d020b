"""A plugin written to a temporary folder, found through a real entry point, here and in worker processes."""

from pathlib import Path

import pytest

TOY = '''
from saehub import Component, hookimpl


@hookimpl
def saehub_exporters():
    return [Component(name="echo", target="toyplug.work:Echo", requires=("toyplug",), env=(("TOY_SETTING", "seen"),))]


@hookimpl
def saehub_trainers():
    return [Component(name="sgd", target="toyplug.work:Trainer", requires=("toyplug",))]
'''
WORK = '''
import os, sys
import torch
from saehub.errors import UsageError


class Echo:
    def __init__(self, config):
        self.config = config

    def environment(self):
        return {"pid": os.getpid(), "setting": os.environ.get("TOY_SETTING")}

    def double(self, x, factor=2):
        print("a library that prints to stdout")
        return x * factor, [{"shape": tuple(x.shape)}]

    def fail(self):
        raise RuntimeError("the library's own words")

    def refuse(self):
        raise UsageError("cannot do that", where="here", fix="do this")

    def die(self, code):
        sys.stderr.write("last words\\n")
        sys.stderr.flush()
        os._exit(code)

    def rows(self):
        yield from ({"i": i} for i in range(3))


class Session:
    def __init__(self, w):
        self.w, self.n = w, 0

    def step(self, x, y=None):
        self.w = self.w - 0.1 * x.mean(0)
        self.n += 1

    def metrics(self):
        return {"loss": float(self.w.sum()), "steps": float(self.n)}

    def state(self):
        return {"w": self.w}, {"n": self.n}

    def load_state(self, tensors, data):
        self.w, self.n = tensors["w"], data["n"]


class Trainer:
    def __init__(self, config):
        pass

    def open(self, job, calibration):
        x, y = calibration(4)
        return Session(x.mean(0))
'''


@pytest.fixture
def toy_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the toy plugin for this test."""
    from saehub import plugins

    package = tmp_path / "site" / "toyplug"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TOY)
    (package / "work.py").write_text(WORK)
    info = tmp_path / "site" / "toyplug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toyplug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saehub.plugins]\ntoyplug = toyplug\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins.catalog.cache_clear()
    yield package
    plugins.catalog.cache_clear()
