"""`saehub doctor`: one line a finding, the last line is what to do."""

from __future__ import annotations

import pytest

from saehub.cli import doctor
from saehub.cli.doctor import Finding


def test_this_machine(saehub):
    said = saehub("doctor")
    assert said.code == 0, said.out
    names = [line.split("  ")[0] for line in said.out.splitlines()[2:]]
    assert names[:6] == ["saehub", "python", "torch", "devices", "libraries", "disk"] and "plugin native" in names
    assert said.err.splitlines()[-1] == "next: saehub recipe run topk-llama"
    data = saehub("doctor", "--json").data
    assert data["ok"] is True and data["next"] == "saehub recipe run topk-llama"
    assert set(data["findings"][0]) == {"name", "status", "detail", "fix"}


@pytest.mark.quick
def test_what_is_broken_comes_first(saehub, monkeypatch):
    def look():
        yield Finding("disk", "warning", "small", "saehub runs gc")
        yield Finding("torch", "failed", "not there", "pip install torch")

    monkeypatch.setattr(doctor, "LOOKS", (look,))
    said = saehub("doctor")
    assert said.code == 1
    assert said.err.splitlines()[1:] == ["disk: saehub runs gc", "torch: pip install torch", "next: pip install torch"]


@pytest.mark.quick
def test_a_look_that_breaks_is_a_finding(saehub, monkeypatch):
    def _moon():
        raise RuntimeError("no moon")
        yield

    monkeypatch.setattr(doctor, "LOOKS", (_moon,))
    said = saehub("doctor")
    assert said.code == 0 and "moon" in said.out and "RuntimeError: no moon" in said.out


@pytest.mark.quick
def test_a_home_that_cannot_be_written(home, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (finding,) = doctor._disk()
    assert finding.status == "failed" and "SAEHUB_HOME" in finding.fix


@pytest.mark.quick
def test_a_full_disk_is_a_warning(home, monkeypatch):
    from saehub.pipeline import workspace

    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 10**8)
    (finding,) = doctor._disk()
    assert finding.status == "warning" and finding.detail.startswith("100 MB free") and "runs gc" in finding.fix


@pytest.mark.quick
def test_offline_is_said(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--gpt2").mkdir()
    (finding,) = doctor._hugging_face()
    assert finding.detail == f"1 models and 0 datasets in {tmp_path}, offline: only what is cached can be used"


@pytest.mark.quick
def test_a_plugin_without_its_library(monkeypatch):
    from saehub import Component, plugins
    from saehub.plugins import Catalog, PluginRow, Registered

    row = PluginRow("far", "far-away", "2.0")
    row.components = [
        Registered("evaluator", Component("core", "x:Y", requires=("no_such_library_xyz",), extra="far"), "far", "far-away", "2.0")
    ]
    broken = PluginRow("bad", "bad", "1", status="broken", error="ImportError: x")
    monkeypatch.setattr(plugins, "catalog", lambda: Catalog([row, broken]))
    findings = {finding.name: finding for finding in doctor._plugins()}
    assert (findings["plugin far"].status, findings["plugin far"].fix) == ("warning", "pip install 'far-away[far]'")
    assert (findings["plugin bad"].status, findings["plugin bad"].fix) == ("warning", "saehub plugins ls --trace")
