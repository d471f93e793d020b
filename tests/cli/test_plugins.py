"""`saehub plugins ls`: whole, broken, disabled and library-less plugins, one row each."""

from __future__ import annotations

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
    ]
    monkeypatch.setattr(plugins, "catalog", lambda: Catalog(rows))


def test_ls(saehub, zoo):
    said = saehub("plugins", "ls")
    assert said.code == 0
    rows = {line.split()[0]: line for line in said.out.splitlines() if line.strip()}
    assert "ok" in rows["native"] and "1 trainer" in rows["native"]
    assert "broken" in rows["bad"] and "ImportError: no [red]x\\x1b[2J" in rows["bad"]
    assert "disabled" in rows["off"]
    assert "missing no_such_library_xyz" in rows["far/core"]
    assert "pip install 'far-away[far]'" in said.err and "saehub plugins ls --trace" in said.err
    assert "\x1b" not in said.out + said.err


def test_trace(saehub, zoo):
    said = saehub("plugins", "ls", "--trace")
    assert "Traceback …\nImportError: x" in said.err


def test_json(saehub, zoo):
    rows = saehub("plugins", "ls", "--json").data["plugins"]
    assert [row["status"] for row in rows] == ["ok", "ok", "broken", "disabled"]
    assert set(rows[0]) == {"name", "distribution", "version", "status", "error", "trace", "components", "architectures", "recipes"}
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
