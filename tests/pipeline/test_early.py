"""The look during training: taken once at its step, on held-out text, without a trace in the result; it warns, and stops where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saehub.checkpoint.format import load
from saehub.errors import Interrupted, StageFailed
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.report.verdicts import verdicts
from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: early
model: {{name: {folder}/model, device: cpu}}
data:
  train: {{source: {folder}/text.txt, tokens: 6_000, context: 32}}
  eval:
    in_sample: {{source: {folder}/text.txt, split: all, tokens: 1_500}}
    out_of_sample: {{source: {folder}/other.txt, split: all, tokens: 1_500}}
extract: {{sites: [resid_post.0], lm_batch: 8, block: 2_048, calibration: 512, store: none}}
train:
  - {{id: a, uses: native/topk, with: {{k: 4, width: 64, batch: 100}}}}
evaluate:
  - {{uses: native/core, with: {{loss: false}}}}
  - uses: native/health
  - uses: native/verdict
early: {{at: [0.1, 0.5], tokens: 600, stop_doomed: {stop}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("early")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(260, words=60)))
    (folder / "other.txt").write_text("\n\n".join(tiny_text(200, words=60, seed=5)))
    tiny_model(folder / "model")
    return folder


def planned(folder: Path, base: Path, edit=lambda text: text, stop: str = "false"):
    recipe, problems = check_text(edit(RECIPE.format(folder=folder, stop=stop)), "early.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    return make_plan(recipe, catalog(), base=base)


def looks(events: list) -> list[dict]:
    return [event.data["early"] for event in events if "early" in event.data]


@pytest.fixture(scope="module")
def looked(folder, tmp_path_factory):
    """A finished run with two looks: its result and its events."""
    events: list = []
    return run(planned(folder, tmp_path_factory.mktemp("home")), [events.append]), events


def test_two_looks_are_told_and_kept(looked):
    result, events = looked
    told = looks(events)
    assert [(look["share"], look["step"], look["rows"]) for look in told] == [(0.1, 6, 600), (0.5, 30, 3000)]
    assert all(look["word"] and look["reasons"] and look["evidence"] for look in told)
    assert {item["dataset"] for item in told[0]["evidence"]} >= {"in_sample", "out_of_sample"}
    card = json.loads((result.run_dir / "run_card.json").read_text())
    assert [look["step"] for look in card["saes"]["a"]["early"]] == [6, 30]


def test_a_look_leaves_no_trace_in_the_result(looked, folder, tmp_path):
    plain = run(planned(folder, tmp_path, lambda text: text.replace("at: [0.1, 0.5]", "at: []")))
    ours, theirs = (load(result.checkpoints["a"]).tensors() for result in (looked[0], plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_interrupted_run_looks_once_and_ends_the_same(looked, folder, tmp_path):
    plan = planned(folder, tmp_path)
    first: list = []

    def stop(event) -> None:
        first.append(event)
        if "early" in event.data:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(plan, [stop])
    second: list = []
    result = run(planned(folder, tmp_path), [second.append])
    assert [look["step"] for look in looks(first)] == [6] and [look["step"] for look in looks(second)] == [30]
    ours, theirs = (load(one.checkpoints["a"]).tensors() for one in (looked[0], result))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def verdicts_of(base: Path) -> list:
    """What the tables of the only run in `base` say."""
    (results,) = base.glob("runs/*/results.json")
    return verdicts(json.loads(results.read_text())["measurements"])


@pytest.fixture
def doomed(monkeypatch):
    """A judge that finds everything doomed: what native/verdict itself finds is tested on the zoo."""
    from saehub_native.verdict import rules

    strict = rules.Rule("strict", "collapsed", "always", lambda e, t: "nothing was learned", ("the learning rate",), doomed=True)
    monkeypatch.setattr(rules, "RULES", (strict,))


def test_doomed_runs_are_warned_of_and_stopped_where_asked(doomed, folder, tmp_path):
    events: list = []
    with pytest.raises(StageFailed, match="stopped after 10% of its rows") as caught:
        run(planned(folder, tmp_path, stop="true"), [events.append])
    assert "collapsed" in caught.value.what and "stop_doomed=false" in caught.value.fix and "nothing was learned" in caught.value.why
    assert [event.kind for event in events if "early" in event.data] == ["warning"]
    (told,) = verdicts_of(tmp_path)
    assert (told.sae, told.word, told.flags[0], told.reasons) == ("a", "collapsed", "stopped after 10% of its rows", ("nothing was learned",))
    again: list = []
    with pytest.raises(StageFailed, match="stopped after"):  # it is known: no second look, no further step
        run(planned(folder, tmp_path, stop="true"), [again.append])
    assert not looks(again) and verdicts_of(tmp_path) == [told]
    went_on: list = []
    result = run(planned(folder, tmp_path), [went_on.append])  # from the state that was kept
    assert any("going on from step" in event.data.get("text", "") for event in went_on) and result.checkpoints["a"].is_dir()
    assert [verdict.flags.count(told.flags[0]) for verdict in verdicts_of(tmp_path)] == [0]


def test_a_look_that_breaks_is_a_warning(folder, tmp_path, monkeypatch):
    from saehub.pipeline.early import EarlyLook

    def broken(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(EarlyLook, "_measure", broken)
    events: list = []
    assert run(planned(folder, tmp_path), [events.append]).checkpoints["a"].is_dir()
    assert sum("out of memory" in event.data.get("text", "") for event in events if event.kind == "warning") == 2


@pytest.mark.parametrize("text", ["at: [1.5]", "at: [0]", "stop_doomed: 3", "sop_doomed: true"])
def test_wrong_settings_are_refused(folder, text):
    recipe, problems = check_text(RECIPE.format(folder=folder, stop="false").rpartition("early:")[0] + f"early: {{{text}}}\n", "early.yaml")
    assert recipe is None and any("early" in str(problem) for problem in problems)
