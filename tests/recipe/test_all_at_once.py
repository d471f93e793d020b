"""Faults that used to hide others: every one of them is told in one go, and none that only comes from what stands in for another."""

from __future__ import annotations

import pytest

from saehub.pipeline.problems import check
from saehub.plugins import catalog

pytestmark = pytest.mark.quick
RECIPE = """
saehub: 1
name: many
model: {name: builtin/tiny-llama}
data:
  train: {source: builtin/python-docs, tokens: 100_000}
  eval: {in_sample: {source: builtin/python-docs}}
extract: {sites: [resid_post.2]}
train:
  - {id: a, uses: native/topk, with: {k: 8, expansion: 2}}
  - {id: b, uses: native/jumprelu, with: {target_l0: 8}}
evaluate: [{uses: native/core}]
"""


@pytest.fixture
def told(tmp_path):
    """`told({"old": "new"})`: path -> message of what is wrong with the recipe changed like that."""

    def ask(changes: dict[str, str]) -> dict[str, str]:
        text = RECIPE
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "many.yaml").write_text(text)
        found = check(tmp_path / "many.yaml", (), catalog())[1]
        return {problem.path: problem.message for problem in found if problem.severity == "error"}

    return ask


def test_a_wrong_type_hides_no_wrong_value_of_the_same_entry(told):
    found = told({"{k: 8, expansion: 2}": "{k: eight, expansion: -2, batch: 0, warmup: 3}", "{target_l0: 8}": "{target_l0: -3, penalty: foo, bandwidth: -1}"})
    assert set(found) == {f"train.a.with.{key}" for key in ("k", "expansion", "batch", "warmup")} | {f"train.b.with.{key}" for key in ("target_l0", "penalty", "bandwidth")}
    assert "whole number" in found["train.a.with.k"] and "above 0" in found["train.a.with.expansion"]


def test_values_that_the_class_itself_refuses_are_told_together(told):
    found = told({"{uses: native/core}": "{uses: native/core, with: {loss: 3, dead_rate: 7, histogram_bins: 0}}"})
    assert set(found) == {f"evaluate.native/core.with.{key}" for key in ("loss", "dead_rate", "histogram_bins")}


def test_faults_of_text_and_extraction_hide_nothing_else(told):
    found = told({"tokens: 100_000": "tokens: many, context: wide", "[resid_post.2]": "[resid_post.2, resid_post.9], block: 0", "k: 8": "k: 999"})
    assert set(found) == {"data.train.tokens", "data.train.context", "extract.sites.1", "extract.block", "train.a.with.k"}
    assert "320 latents" in found["train.a.with.k"]
    assert set(told({"tokens: 100_000": "context: 64", "k: 8": "k: 999"})) == {"data.train", "train.a.with.k"}
    assert set(told({"builtin/tiny-llama": "builtin/tiny-llama, dtype: flot32", "k: 8": "k: 999"})) == {"model.dtype", "train.a.with.k"}


def test_nothing_is_told_that_comes_from_what_stands_in(told):
    assert set(told({"k: 8": "k: eight, k_anneal: 0.5, k_start: 16"})) == {"train.a.with.k"}  # k_start is above the 1 that stands in, and was above 8
    assert set(told({"tokens: 100_000": "tokens: -1", "expansion: 2": "expansion: 2, batch: 1_000_000"})) == {"data.train.tokens"}  # nobody knows how many rows
    assert set(told({"tokens: 100_000": "tokens: 100", "k: 8": "k: eight"})) >= {"train.a.with.k"}
    assert set(told({"builtin/tiny-llama": "builtin/tiny-lama"})) == {"model.name"}
