"""An evaluator that judges measurements: planned after those that make them, keyed on them, given them, and shown on top."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.report.verdicts import verdicts
from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: judged
model: {{name: {folder}/model, device: cpu}}
data:
  train: {{source: {folder}/text.txt, tokens: 4_000, context: 32}}
  eval:
    in_sample: {{source: {folder}/text.txt, split: all, tokens: 600}}
    out_of_sample: {{source: {folder}/other.txt, split: all, tokens: 500}}
extract: {{sites: [resid_post.0, resid_post.1], lm_batch: 8, block: 4_096, calibration: 512, store: none}}
train:
  - {{id: a, uses: native/topk, site: resid_post.0, with: {{k: 4, width: 64, batch: 128}}}}
  - {{id: b, uses: native/topk, site: resid_post.1, with: {{k: 4, width: 64, batch: 128}}}}
evaluate:
  - uses: native/verdict
  - {{uses: native/core, with: {{loss: false}}}}
  - uses: native/health
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("judged")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(200, words=60)))
    (folder / "other.txt").write_text("\n\n".join(tiny_text(200, words=60, seed=5)))
    tiny_model(folder / "model")
    return folder


def planned(folder: Path, base: Path, edit=lambda text: text):
    recipe, problems = check_text(edit(RECIPE.format(folder=folder)), "judged.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    return make_plan(recipe, catalog(), base=base)


def test_judges_come_last_and_depend_on_what_they_read(folder, tmp_path):
    plan = planned(folder, tmp_path)
    order = [stage.id for stage in plan.of("evaluate")]
    assert order[-2:] == ["evaluate/native/verdict/a", "evaluate/native/verdict/b"]
    stage = plan.stage("evaluate/native/verdict/a")
    assert {"evaluate/native/core/a", "evaluate/native/health/a"} == {name for name in stage.inputs if name.startswith("evaluate/")}
    narrower = "- {uses: native/health, with: {duplicate_cosine: 0.8}}"
    other = planned(folder, tmp_path, lambda text: text.replace("- uses: native/health", narrower))
    assert other.stage(stage.id).key != stage.key and other.stage("evaluate/native/core/a").key == plan.stage("evaluate/native/core/a").key
    alone = planned(folder, tmp_path, lambda text: text[: text.index("  - {uses: native/core")])
    assert any("native/core" in warning and "add" in warning for warning in alone.warnings)


def test_a_run_ends_with_verdicts_in_results_card_and_table(folder, tmp_path, capsys, monkeypatch):
    from saehub.cli import render

    result = run(planned(folder, tmp_path))
    said = {verdict.sae: verdict for verdict in verdicts(result.measurements)}
    assert set(said) == {"a", "b"} and all(verdict.reasons for verdict in said.values())
    assert sorted(verdict.rank for verdict in said.values()) == [1, 2]
    card = json.loads((result.run_dir / "run_card.json").read_text())
    assert card["verdicts"]["a"]["word"] == said["a"].word and card["verdicts"]["a"]["evidence"]
    shifts = {row.metric for row in result.measurements if row.evaluator == "native/verdict" and row.metric.startswith("out_minus_in@")}
    assert "out_minus_in@fvu" in shifts and "out_minus_in@l0_share" not in shifts  # native/health tells its own
    monkeypatch.setenv("COLUMNS", "400")  # no cell wraps
    render.results(result.measurements)
    shown = capsys.readouterr().out
    assert shown.index("verdicts (in-sample)") < shown.index("healthiest of this run") and said["a"].reasons[0][:30] in shown.replace("\n", " ")
    again = run(planned(folder, tmp_path))
    assert [row.to_json() for row in again.measurements] == [row.to_json() for row in result.measurements]
    elsewhere = f"saes: [{{id: moved, load: {result.checkpoints['b']}, site: resid_post.0}}]\n"  # trained at resid_post.1
    (moved,) = verdicts(run(planned(folder, tmp_path, lambda text: text[: text.index("train:\n")] + elsewhere + text[text.index("evaluate:") :])).measurements)
    assert "site in doubt" in moved.flags and moved.word != "good"


def test_one_checkpoint_is_judged_with_what_the_judge_reads():
    from saehub.pipeline.single import _read_by

    assert _read_by("native/verdict") == [{"uses": "native/core"}, {"uses": "native/health"}]
    assert _read_by("native/core") == [] and _read_by("no/such") == []
