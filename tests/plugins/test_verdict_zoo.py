"""The zoo: SAEs trained with planted failures get the verdict that they deserve, a few of them here and now, all of them as they were measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from saehub_native.verdict.evidence import gather
from saehub_native.verdict.rules import judge
from tests.benchmarks import zoo
from tests.benchmarks.verdict_zoo import judged, latents_of, macro_f1

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "verdict_zoo.jsonl"
"""Made by `python tests/benchmarks/verdict_zoo.py`: the evidence of every run, which the rules of today judge here."""


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]


@pytest.mark.quick
def test_what_is_stored_is_of_the_zoo(runs):
    name = ("fault", "half", "width", "seed", "site", "k")
    stored = [str([run[key] for key in name]) for run in runs]
    assert len(stored) == len(set(stored)) and set(stored) <= {str([run[key] for key in name]) for run in zoo.runs()}
    assert {run["label"] for run in runs} == {"good", "deceptively good", "dead", "duplicated", "collapsed"}
    assert len(runs) >= 40
    assert {run["label"] for run in runs if run["half"] == "test"} == {run["label"] for run in runs}


@pytest.mark.quick
def test_failures_are_named_on_runs_that_the_rules_were_not_set_on(runs):
    for half in ("set", "test"):
        pairs = [(run["label"], judged(run, "final").verdict) for run in runs if run["half"] == half]
        assert macro_f1(pairs) >= 0.9, (half, Counter(pairs))


@pytest.mark.quick
def test_doomed_at_a_tenth_is_bad_at_the_end(runs):
    doomed = [run for run in runs if judged(run, "early").doomed]
    assert len(doomed) >= len(runs) / 4
    assert all(judged(run, "final").verdict not in ("good", "undecided") and run["label"] != "good" for run in doomed)


@pytest.mark.quick
def test_macro_f1_by_hand():
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "undecided"), ("c", "c")]
    # per class, by hand: a: 2·1/(2·1+0+1), b: 2·1/(2·1+1+1), c: 1
    assert macro_f1(pairs) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> zoo.World:
    torch.set_num_threads(1)
    return zoo.World(tmp_path_factory.mktemp("zoo"), rows=20_480, eval_rows=5_000, early_rows=2_500, sites=("resid_post.2", "mlp_out.2"))


@pytest.mark.parametrize("name", [name for name in zoo.PLANTED if name != "duplicated: a third"])
def test_an_sae_trained_here_with_one_fault_gets_the_verdict(world, name):
    found = zoo.run(world, name, width=320, seed=77, k=32, loss_sequences=0)
    judgement = judge(gather(found["final"], latents=latents_of(found["final"]), d_in=160))
    assert judgement.verdict == zoo.PLANTED[name].label, judgement
    assert judgement.reasons
