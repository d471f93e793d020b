"""What a trainer's user should know: shown once a run, kept in the run card and in the checkpoint, whether it was known at plan or only at the end."""

import json

import pytest
import torch

from saehub.checkpoint.format import read_header
from saehub.pipeline.cautions import cautions_of, grouped
from saehub.pipeline.components import Components, optional
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.testing.toys import tiny_model, tiny_text
from saehub_native.config import TopKConfig
from saehub_native.train import NativeSession

RECIPE = """
saehub: 1
name: toy
model: {{name: {model}, device: cpu}}
data: {{train: {{source: {text}, tokens: 1_000, context: 32}}}}
extract: {{sites: [resid_post.0], lm_batch: 8, block: 512, calibration: 256}}
train:
  - {{id: a, uses: native/topk, with: {{k: 4, width: 64, batch: 100}}}}
  - {{id: b, uses: native/topk, with: {{k: 2, width: 64, batch: 100}}}}
"""


@pytest.mark.quick
def test_one_line_a_sentence():
    assert grouped({"a": ["x", "y", "x"], "b": ["y"], "c": []}) == ["a: x", "a, b: y"]
    assert cautions_of(object(), None) == ()


def test_shown_once_and_kept(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_text(60)))
    text = RECIPE.format(model=tiny_model(tmp_path / "model"), text=tmp_path / "text.txt")
    monkeypatch.setattr(TopKConfig, "cautions", lambda self, job: ["the library does this"], raising=False)
    monkeypatch.setattr(TopKConfig, "inexact_resume", lambda self, job: "within 1e-6" if self.k == 2 else None, raising=False)
    monkeypatch.setattr(NativeSession, "cautions", lambda self: [f"it ended after {self.steps_done} steps"], raising=False)
    recipe, _ = check_text(text, "toy.yaml")
    planned = make_plan(recipe, catalog(), base=tmp_path / "home")
    assert planned.warnings == ("a, b: the library does this", "b: a resumed run is not bit-identical: within 1e-6")

    events = []
    result = run(planned, [events.append])
    said = [(event.stage, event.data["text"]) for event in events if event.kind == "warning" and not event.data["text"].startswith("preflight")]
    learnt = "it ended after 10 steps"
    assert said == [*((None, line) for line in planned.warnings), ("train/a", learnt), ("train/b", learnt)]
    for again in (False, True):  # a cached run says what was known at plan, and its card still holds all
        card = json.loads((result.run_dir / "run_card.json").read_text())
        assert card["warnings"] == [*planned.warnings, f"a, b: {learnt}"]
        assert learnt in (result.run_dir / "run_card.md").read_text()
        if not again:
            run(make_plan(recipe, catalog(), base=tmp_path / "home"))
    assert read_header(result.checkpoints["b"])["provenance"]["cautions"] == [
        "the library does this",
        "a resumed run is not bit-identical: within 1e-6",
        learnt,
    ]


@pytest.mark.quick
def test_an_object_in_a_worker_may_have_none(toy_plugin):
    with Components() as components:
        echo = components.make(catalog().find("exporter", "toyplug/echo"), None)
        assert optional(echo, "cautions") is None and optional(echo, "environment")["setting"] == "seen"
    assert optional(object(), "cautions") is None
