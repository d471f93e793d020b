"""A catalogue with small components of its own, so that these tests stand on no plugin."""

import sys
import types
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Gt, Le

from saehub.api import Component
from saehub.plugins import Catalog, PluginRow, Registered

MODULE = "saehub_test_recipe_components"


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adam", "signum", "muon"] = "adam"
    lr: Annotated[float, Gt(0)] = 1e-3


@dataclass(frozen=True)
class TopK:
    k: Annotated[int, Gt(0)]
    expansion: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    names: tuple[str | int, ...] = ()
    verbose: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    share: Annotated[float, Gt(0), Le(1)] = 1.0
    batch: int = 2048

    def __post_init__(self):
        if self.k == 13:
            raise ValueError("k: 13 brings bad luck")
        if self.k == 14:
            raise ValueError("k is 14, and that does not work either")
        if self.k == 15:
            raise ValueError("these settings do not go together")
        if self.k == 16 and self.verbose:
            raise RuntimeError("the plugin's own bug")


@dataclass(frozen=True)
class Core:
    loss_sequences: int | None = None


@dataclass(frozen=True)
class Bad:
    there: "NoSuchType"  # noqa: F821


CONFIGS = {"Optimizer": Optimizer, "TopK": TopK, "Core": Core, "Bad": Bad}
COMPONENTS = [
    ("extractor", "native", Component("hf", "nowhere:HF", needs=("model", "tokens"))),
    ("extractor", "native", Component("files", "nowhere:Files")),
    ("trainer", "native", Component("topk", "nowhere:TopK", config=f"{MODULE}:TopK", needs=("activations",))),
    ("trainer", "rival", Component("topk", "nowhere:TopK", config=f"{MODULE}:TopK")),
    ("trainer", "rival", Component("relu", "nowhere:Relu", config=f"{MODULE}:TopK", requires=("no_such_library",), extra="rival")),
    ("trainer", "broken", Component("config", "nowhere:X", config=f"{MODULE}:Gone")),
    ("trainer", "broken", Component("types", "nowhere:X", config=f"{MODULE}:Bad")),
    ("evaluator", "native", Component("core", "nowhere:Core", config=f"{MODULE}:Core", needs=("model", "tokens"))),
    ("exporter", "saelens", Component("saelens", "nowhere:Codec")),
]


@pytest.fixture
def catalog(monkeypatch):
    """Components of three plugins; `rows` may carry recipes."""
    module = types.ModuleType(MODULE)
    for name, cls in CONFIGS.items():
        setattr(module, name, cls)
    monkeypatch.setitem(sys.modules, MODULE, module)
    rows = {}
    for kind, plugin, component in COMPONENTS:
        row = rows.setdefault(plugin, PluginRow(plugin, f"{plugin}-dist", "1.0"))
        row.components.append(Registered(kind, component, plugin, row.distribution, row.version))
    return Catalog(rows.values())


GOOD = """\
saehub: 1
name: good
model: {name: builtin/tiny-llama}
data:
  train: {source: builtin/python-docs, tokens: 1000}
  eval:
    in_sample: {source: builtin/python-docs}
extract: {sites: [resid_post.2]}
train:
  - {id: a, uses: native/topk, with: {k: 32}}
evaluate:
  - {uses: native/core}
"""


@pytest.fixture
def good():
    """A recipe without problems under `catalog`."""
    return GOOD
