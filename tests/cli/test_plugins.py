"""`saehub plugins ls`: whole, broken, disabled and library-less plugins, one row each."""

from __future__ import annotations

import importlib
import itertools
import sys

import pytest

from saehub import Component, plugins
from saehub.plugins import Catalog, PluginRow, Registered

pytestmark = pytest.mark.quick


@pytest.fixture()
def zoo(monkeypatch):
    """One plugin of each state."""
    whole = PluginRow("native", "saehub", "0.1.0")
    whole.components = [Registered("trainer", Component("topk", "x:Y", summary="k largest"), "native", "saehub", "0.1.0")]
    lacking = PluginRow("far", "far-away", "2.0")
    lacking.components = [
        Registered(
            "evaluator", Component("core", "x:Y", requires=("no_such_library_xyz",), extra="far", summary="far"), "far", "far-away", "2.0"
        )
    ]
    rows = [
        whole,
        lacking,
        PluginRow("bad", "bad-dist", "1", status="broken", error="ImportError: no [red]x\x1b[2J", trace="Traceback …\nImportError: x"),
        PluginRow("off", "off-dist", "1", status="disabled"),
        PluginRow("late", "late-dist", "1", warning="its registration took 9.0 s"),
    ]
    monkeypatch.setattr(plugins, "catalog", lambda: Catalog(rows))


def test_ls(saehub, zoo):
    said = saehub("plugins", "ls")
    assert said.code == 0
    rows = {line.split()[0]: line for line in said.out.splitlines() if line.strip()}
    assert "ok" in rows["native"] and "1 trainer" in rows["native"]
    assert "broken" in rows["bad"] and "ImportError: no [red]x\\x1b[2J" in rows["bad"]
    assert "disabled" in rows["off"]
    assert "ok, slow" in rows["late"] and "late is slow: its registration took 9.0 s" in said.err
    assert "missing no_such_library_xyz" in rows["far/core"]
    assert "pip install 'far-away[far]'" in said.err and "saehub plugins ls --trace" in said.err
    assert "\x1b" not in said.out + said.err


def test_trace(saehub, zoo):
    said = saehub("plugins", "ls", "--trace")
    assert "Traceback …\nImportError: x" in said.err


def test_json(saehub, zoo):
    rows = saehub("plugins", "ls", "--json").data["plugins"]
    assert [row["status"] for row in rows] == ["ok", "ok", "broken", "disabled", "ok"]
    assert set(rows[0]) == {"name", "distribution", "version", "status", "error", "trace", "warning", "components", "architectures", "recipes"}
    assert rows[1]["components"] == [
        {
            "address": "far/core",
            "kind": "evaluator",
            "summary": "far",
            "needs": [],
            "requires": ["no_such_library_xyz"],
            "libraries": {},
            "missing": ["no_such_library_xyz"],
            "install": "pip install 'far-away[far]'",
        }
    ]
    assert rows[2]["trace"] is None


def test_the_real_ones(saehub):
    data = saehub("plugins", "ls", "--json").data
    addresses = {item["address"] for row in data["plugins"] for item in row["components"]}
    assert {"native/hf", "native/files", "native/topk", "native/core", "saelens/saelens"} <= addresses
    assert all(row["status"] == "ok" for row in data["plugins"])
    by_address = {item["address"]: item for row in data["plugins"] for item in row["components"]}
    assert set(by_address["saelens/saelens"]["libraries"]) == {"sae-lens"} and by_address["native/topk"]["libraries"] == {}


# ---------------------------------------------------------------------- new
KINDS = ("trainer", "extractor", "evaluator", "exporter")
SUBSETS = [subset for n in range(1, 5) for subset in itertools.combinations(KINDS, n)]


@pytest.mark.parametrize("kinds", SUBSETS, ids=",".join)
def test_new_registers_the_kinds_that_were_asked_for(saehub, tmp_path, monkeypatch, kinds):
    name = "fresh-" + "-".join(kinds)
    said = saehub("plugins", "new", str(tmp_path / "it"), "--name", name, "--kinds", ",".join(kinds))
    assert said.code == 0 and f"cd {tmp_path / 'it'} && uv run pytest" in said.err
    files = [tmp_path / "it" / line for line in said.out.splitlines()]
    assert files and all(path.is_file() for path in files)
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "only with" not in text and "saehub_example" not in text and "saehub-example" not in text and "example/" not in text
        if path.suffix == ".py":
            compile(text, str(path), "exec")
    monkeypatch.syspath_prepend(str(tmp_path / "it" / "src"))
    row = PluginRow(name, name, "0")
    module = name.replace("-", "_")
    plugins._register(row, lambda: importlib.import_module(module))
    assert sorted(item.kind for item in row.components) == sorted(kinds)
    for item in row.components:
        assert item.load() and (item.load_config() is None or item.load_config()())
    assert [item.name for item in row.architectures] == ([f"{module}_peak"] if "trainer" in kinds else [])
    recipes = {recipe for recipe, needed in {"peak": {"trainer"}, "bars": {"trainer", "extractor"}}.items() if needed <= set(kinds)}
    assert {path.stem for path in row.recipes} == recipes
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == module]:
        del sys.modules[loaded]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--name", "Bad Name"], "'Bad Name' cannot name a plugin"),
        (["--name", "saehub-native"], "an installed plugin is already called 'native'"),
        (["--name", "torch"], "'torch' cannot name a plugin"),
        (["--name", "class"], "'class' cannot name a plugin"),
        (["--name", "saehub"], "'saehub' cannot name a plugin"),
        (["--name", "json"], "'json' cannot name a plugin"),
        (["--name", "fine", "--kinds", "trainr"], "did you mean 'trainer'?"),
        (["--name", "fine", "--kinds", ","], "no kind of component"),
    ],
)
def test_new_refuses(saehub, tmp_path, args, words):
    said = saehub("plugins", "new", str(tmp_path / "it"), *args)
    assert said.code == 2 and words in said.err and "fix: " in said.err
    assert not (tmp_path / "it").exists()


def test_new_quotes_the_folder_that_it_names(saehub, tmp_path):
    folder = tmp_path / "my plugins" / "saehub-quoted"
    said = saehub("plugins", "new", folder, "--kinds", "evaluator")
    assert said.code == 0 and f"next: cd '{folder}' && uv run pytest" in said.err


def test_new_overwrites_nothing(saehub, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = saehub("plugins", "new", str(tmp_path), "--name", "fine")
    assert said.code == 2 and "is not an empty folder" in said.err and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------------- check
@pytest.fixture()
def toys(monkeypatch):
    """A plugin with a trainer that keeps its promises, and one whose library nobody has."""
    row = PluginRow("toys", "toys-dist", "1")
    made = [
        ("trainer", Component("toy", "saehub.testing.components:ToyTrainer", config="saehub.testing.settings:ToyTrain")),
        ("evaluator", Component("far", "x:Y", requires=("no_such_library_xyz",), extra="far")),
    ]
    row.components = [Registered(kind, component, "toys", "toys-dist", "1") for kind, component in made]
    broken = PluginRow("bad", "bad-dist", "1", status="broken", error="ImportError: x")
    for module in ("saehub.plugins", "saehub.testing.conformance", "saehub.testing.plugin"):
        monkeypatch.setattr(importlib.import_module(module), "catalog", lambda: Catalog([row, broken]))


def test_check_prints_every_promise_and_what_could_not_be_tried(saehub, toys):
    said = saehub("plugins", "check", "toys", "--json")
    assert said.code == 1 and said.data["ok"] is False
    toy, far = said.data["components"]
    assert toy["ok"] and {"save and restore", "finds planted features"} <= {check["name"] for check in toy["checks"]}
    assert not far["ok"] and "pip install 'toys-dist[far]'" in far["checks"][0]["detail"]


def test_check_as_a_table_with_settings_that_do_not_fit(saehub, toys):
    said = saehub("plugins", "check", "toys-dist", "--set", "toy.k=1000")
    assert said.code == 1 and "FAIL" in said.out and "toys/toy" in said.out + said.err and "2 break a promise" in said.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["toy"], "did you mean 'toys'?"),
        (["bad"], "ImportError: x"),
        (["toys", "--set", "ty.k=1"], "did you mean 'toy'?"),
        (["toys", "--set", "k=1"], "names no component"),
        (["toys", "--set", "nonsense"], "--set nonsense has no value\n  fix: --set COMPONENT.KEY=VALUE, such as --set topk.k=4"),
        (["toys", "--set", "toy.k=[3"], "--set toy.k=[3 cannot be read"),
        (["toys", "--folder", "toy"], "--folder toy names no component"),
        (["toys", "--folder", "toy=/no/such"], "does not exist"),
    ],
)
def test_check_refuses(saehub, toys, args, words):
    said = saehub("plugins", "check", *args)
    assert said.code == 2 and words in said.err
