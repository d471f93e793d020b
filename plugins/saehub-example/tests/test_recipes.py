"""The shipped recipes in; runs of them at a small size out."""

from __future__ import annotations

import pytest

import saehub
from saehub.plugins import catalog

SMALL = {
    "peak": {"data.train.tokens": 8_192, "extract.calibration": 1_024, "extract.block": 4_096, "evaluate.native/core.with.baselines": False,
             "data.eval.in_sample.tokens": 1_024, "data.eval.out_of_sample.tokens": 1_024},
    "bars": {"extract.with.images": 2_048},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for row in catalog().rows() if row.plugin == "example" for path in row.recipes))
def test_a_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEHUB_HOME", str(tmp_path))
    run = saehub.run(f"example/{name}", set=SMALL[name])
    assert run.checkpoints and all((path / "saehub.json").is_file() for path in run.checkpoints.values())
    assert all(row["status"] != "failed" for row in run.results)
