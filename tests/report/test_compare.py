"""Differences between runs: standard errors against numpy and a resampling, and no ranking that the data do not carry."""

from __future__ import annotations

import numpy as np
import pytest

from saehub.api import Measurement
from saehub.report.compare import compare, difference, within

pytestmark = pytest.mark.quick


def row(value, stderr=0.01, sae="a", metric="fvu", better="lower", digest="d1", **more):
    known = {"evaluator": "native/core", "definition": f"saehub.{metric}/1", "dataset": "in_sample", "dataset_hash": digest}
    return Measurement(metric=metric, value=value, stderr=stderr, subjects=(sae,), better=better, **{**known, **more})


def ratio_row(top, bottom, sign=1.0, **more):
    value = float(top.sum() / bottom.sum())
    residual = top - value * bottom
    stderr = float(np.sqrt(len(top) / (len(top) - 1) * (residual**2).sum()) / bottom.sum())
    return row(value if sign > 0 else 1 - value, stderr, parts={"numerator": top.tolist(), "denominator": bottom.tolist()}, **more)


def test_unpaired_errors_add_in_squares():
    found = difference(row(0.5, 0.03), row(0.7, 0.04))
    assert found.delta == pytest.approx(0.2)
    assert found.stderr == pytest.approx(0.05)
    assert not found.paired
    assert found.verdict == "a better"  # lower is better


@pytest.mark.parametrize(("gap", "verdict"), [(0.0391, "not ranked"), (0.0393, "a better")])
def test_ranking_is_refused_exactly_while_the_intervals_overlap(gap, verdict):
    found = difference(row(0.5, 0.01), row(0.5 + gap, 0.01))  # the intervals touch at 2 * 1.96 * 0.01 = 0.0392
    assert found.verdict == verdict
    assert bool(found.reason) == (verdict == "not ranked")


def test_the_better_side_follows_the_direction():
    assert difference(row(0.5, better="higher"), row(0.9, better="higher")).verdict == "b better"
    assert difference(row(0.9, better="higher"), row(0.5, better="higher")).verdict == "a better"
    assert difference(row(0.9, better="none"), row(0.5, better="none")).verdict == "not ranked"


def test_paired_error_is_that_of_the_differences():
    """Two SAEs on the same 400 sequences that are alike up to a small shift: pairing must see it, intervals must not."""
    generator = np.random.default_rng(0)
    bottom = generator.gamma(5.0, 1.0, 400)
    top = bottom * generator.normal(0.3, 0.1, 400)
    other = top + bottom * generator.normal(0.002, 0.004, 400)
    found = difference(ratio_row(top, bottom), ratio_row(other, bottom))
    draws = generator.integers(0, 400, (4000, 400))
    gaps = other[draws].sum(1) / bottom[draws].sum(1) - top[draws].sum(1) / bottom[draws].sum(1)
    assert found.paired
    assert found.stderr == pytest.approx(gaps.std(), rel=0.06)  # bootstrap of 4,000: 1/sqrt(8000) = 1.1 % of noise
    assert found.verdict == "a better"
    apart = difference(row(float(top.sum() / bottom.sum()), 0.006), row(float(other.sum() / bottom.sum()), 0.006))
    assert apart.verdict == "not ranked"


def test_pairing_works_for_one_minus_a_ratio():
    generator = np.random.default_rng(1)
    bottom, top = generator.gamma(5.0, 1.0, 200), generator.gamma(2.0, 1.0, 200)
    plain = difference(ratio_row(top, bottom), ratio_row(top * 1.1, bottom))
    turned = difference(ratio_row(top, bottom, sign=-1, better="higher"), ratio_row(top * 1.1, bottom, sign=-1, better="higher"))
    assert turned.stderr == pytest.approx(plain.stderr)
    assert turned.delta == pytest.approx(-plain.delta)
    assert turned.verdict == plain.verdict == "a better"


def test_parts_that_do_not_give_the_value_are_not_used():
    generator = np.random.default_rng(2)
    bottom, top = generator.gamma(5.0, 1.0, 50), generator.gamma(2.0, 1.0, 50)
    wrong = ratio_row(top, bottom, better="lower")
    moved = Measurement(**{**vars(wrong), "value": wrong.value + 0.01})
    assert not difference(moved, wrong).paired


def test_parts_of_other_text_are_not_paired():
    generator = np.random.default_rng(3)
    bottom, top = generator.gamma(5.0, 1.0, 50), generator.gamma(2.0, 1.0, 50)
    found = difference(ratio_row(top, bottom), ratio_row(top, bottom, digest="d2"))
    assert not found.paired
    assert found.verdict == "not comparable"
    assert "different text" in found.reason


@pytest.mark.parametrize(
    ("left", "right", "verdict", "words"),
    [
        (row(0.5), row(0.5), "equal", ""),
        (row(0.5), row(0.6, definition="other/1"), "not comparable", "two definitions"),
        (row(0.5, None), row(0.6), "not ranked", "no standard error on one side"),
        (row(0.5, None), row(0.6, None), "not ranked", "no standard error on either side"),
        (row(0.5), row(None, None, status="failed", reason="NaN"), "not comparable", "NaN"),
    ],
)
def test_what_cannot_be_compared_says_so(left, right, verdict, words):
    found = difference(left, right)
    assert found.verdict == verdict
    assert words in found.reason


def test_an_evaluators_own_interval_is_used():
    left = row(0.5, 0.5, ci_low=0.49, ci_high=0.51)
    right = row(0.6, 0.5, ci_low=0.59, ci_high=0.61)
    assert difference(left, right).verdict == "a better"


@pytest.mark.parametrize(
    ("l0", "told"),
    [(32.0, []), (33.0, []), (48.0, ["a: L0 is 32 in the first run and 48 in the second; a better reconstruction may be bought with it"])],
)
def test_another_sparsity_is_said(l0, told):
    """A lower FVU at a higher L0 is another point of a trade-off, not a better dictionary."""
    left, right = [row(0.5), row(32.0, 0.0, metric="l0", better="none")], [row(0.2), row(l0, 0.0, metric="l0", better="none")]
    assert compare(left, right)[1] == told


def test_saes_are_matched_by_id_or_alone_by_being_alone():
    found, remarks = compare([row(0.5, sae="k32")], [row(0.9, sae="k64")])
    assert [(item.subjects_a, item.subjects_b) for item in found] == [(("k32",), ("k64",))]
    assert remarks == []
    found, remarks = compare([row(0.5, sae="x"), row(0.5, sae="y")], [row(0.9, sae="y"), row(0.9, sae="z"), row(1.0, sae="y", metric="l0")])
    assert [item.subjects_a for item in found] == [("y",)]
    assert remarks == ["only in the first run: x: fvu", "only in the second run: z: fvu, y: l0"]


def test_the_interval_is_that_of_an_independent_paired_bootstrap():
    generator = np.random.default_rng(4)
    bottom = generator.gamma(2.0, 1.0, 120)
    top, other = bottom * generator.normal(0.3, 0.1, 120), bottom * generator.normal(0.33, 0.1, 120)
    found = difference(ratio_row(top, bottom), ratio_row(other, bottom))
    draws = np.random.default_rng(5).integers(0, 120, (20_000, 120))
    gaps = other[draws].sum(1) / bottom[draws].sum(1) - top[draws].sum(1) / bottom[draws].sum(1)
    width = gaps.std()
    assert found.ci_low == pytest.approx(np.quantile(gaps, 0.025), abs=0.06 * width)
    assert found.ci_high == pytest.approx(np.quantile(gaps, 0.975), abs=0.06 * width)
    assert found.p == pytest.approx(2 * min((gaps <= 0).mean(), (gaps >= 0).mean()), abs=0.01)


def test_equal_saes_are_ranked_as_often_as_the_level_says():
    """200 pairs without a difference: about 5 % are ranked, not 0 % and not 15 %."""
    generator, ranked = np.random.default_rng(6), 0
    for _ in range(200):
        bottom = generator.gamma(5.0, 1.0, 60)
        rows = [ratio_row(bottom * generator.normal(0.3, 0.1, 60), bottom) for _ in range(2)]
        ranked += difference(*rows).verdict in ("a better", "b better")
    assert 3 <= ranked <= 22  # binomial(200, 0.05) is outside with p < 0.005; the bootstrap of 60 is a little narrow


def test_holm_is_the_textbook_step_down():
    """p = 0.01, 0.02, 0.03 over three pairs become 0.03, 0.04, 0.04 (Holm 1979)."""
    z = {0.01: 2.5758293, 0.02: 2.3263479, 0.03: 2.1700904}
    left = [row(0.0, 0.1, sae=f"s{i}") for i in range(3)]
    right = [row(0.1 * np.sqrt(2) * z[p], 0.1, sae=f"s{i}") for i, p in enumerate(z)]
    found, _ = compare(left, right)
    assert [item.p for item in found] == pytest.approx([0.03, 0.04, 0.04], rel=1e-5)
    assert {item.family for item in found} == {3}


def test_a_ranking_that_holm_does_not_carry_is_taken_back():
    generator = np.random.default_rng(7)
    bottom = generator.gamma(5.0, 1.0, 100)
    top = bottom * generator.normal(0.3, 0.1, 100)
    other = top + bottom * generator.normal(0.0230, 0.1, 100)
    alone = difference(ratio_row(top, bottom), ratio_row(other, bottom))
    assert alone.verdict == "a better" and 0.0025 < alone.p < 0.05
    many = [(ratio_row(top, bottom, sae=f"s{i}"), ratio_row(top, bottom, sae=f"s{i}")) for i in range(19)]
    found, _ = compare([ratio_row(top, bottom), *(a for a, _ in many)], [ratio_row(other, bottom), *(b for _, b in many)])
    assert found[0].verdict == "not ranked" and "Holm" in found[0].reason and found[0].family == 20


def test_the_saes_of_one_run_are_compared_in_pairs_at_their_site():
    rows = [row(value, 0.001, sae=sae, site=site) for sae, value, site in (("a", 0.1, "x"), ("b", 0.2, "x"), ("c", 0.3, "x"), ("d", 0.4, "y"))]
    rows += [row(value, 0.0, sae=sae, site="x", metric="l0", better="none") for sae, value in (("a", 32.0), ("b", 32.0), ("c", 64.0))]
    found, remarks = within(rows)
    fvu = [item for item in found if item.metric == "fvu"]
    assert [(item.subjects_a, item.subjects_b) for item in fvu] == [(("a",), ("b",)), (("a",), ("c",)), (("b",), ("c",))]
    assert all(item.verdict == "a better" and item.family == 3 for item in fvu)
    assert [text.partition(":")[0] for text in remarks] == ["a and c", "b and c"]
    assert all("L0 is 32 in the first and 64 in the second" in text for text in remarks)
