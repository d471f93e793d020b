"""Matchings: scipy's total with gap 0, a bound that holds when the search is cut short, and every shape that dictionaries have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saehub.errors import StageFailed
from saehub_native.evaluate.matching import assignment
from saehub_native.evaluate.matching.assignment import assign, unit


def dense(a: torch.Tensor, b: torch.Tensor, absolute: bool = False) -> float:
    """The greatest total, by scipy, in float64."""
    s = (unit(a.double()) @ unit(b.double()).T).numpy()
    s = np.abs(s) if absolute else s
    rows, cols = linear_sum_assignment(s, maximize=True)
    return float(s[rows, cols].sum())


def two(kind: str, n: int, m: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, d, generator=draw), torch.randn(m, d, generator=draw)
    if kind == "shared":
        half = min(n, m) // 2
        b[:half] = a[:half] + 0.5 * torch.randn(half, d, generator=draw)
        b = b[torch.randperm(m, generator=draw)]
    if kind == "clusters":
        centres = torch.randn(max(n // 15, 1), d, generator=draw)
        a, b = (centres[torch.randint(0, len(centres), (size,), generator=draw)] + 0.05 * torch.randn(size, d, generator=draw) for size in (n, m))
    if kind == "copies":  # every latent four times: all totals tie
        a, b = a[: n // 4].repeat(4, 1)[:n], a[: n // 4].repeat(4, 1)[torch.randperm(n // 4 * 4, generator=draw)][:m]
    if kind == "one cone":  # all alike, and negative against the other side
        a, b = 0.1 * a + 1, 0.1 * b - 1
    return a, b


@pytest.mark.quick
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("kind", "n", "m", "d"), [
    ("random", 400, 400, 24), ("shared", 400, 400, 24), ("clusters", 300, 300, 16), ("copies", 200, 200, 12), ("one cone", 150, 150, 8),
    ("shared", 200, 350, 24), ("shared", 350, 200, 24), ("clusters", 240, 300, 16), ("random", 1, 1, 3), ("random", 1, 7, 3), ("random", 3, 2, 2),
])  # fmt: skip
def test_the_total_is_scipys_and_the_gap_is_zero(kind, n, m, d, absolute):
    a, b = two(kind, n, m, d)
    found = assign(a, b, absolute=absolute)
    best = dense(a, b, absolute)
    assert found.total == pytest.approx(best, abs=1e-9 * max(n, m))
    assert found.gap <= 1e-9 and not found.stopped and found.bound >= best - 1e-9
    matched = found.partner_N[found.partner_N >= 0]
    assert len(set(matched)) == len(matched) == min(n, m)
    cosines = (unit(a.double())[found.partner_N >= 0] * unit(b.double())[matched]).sum(1).numpy()
    np.testing.assert_allclose(found.similarity_N[found.partner_N >= 0], np.abs(cosines) if absolute else cosines, atol=1e-12)
    assert np.isnan(found.similarity_N[found.partner_N < 0]).all()


@pytest.mark.parametrize("kind", ["shared", "random"])
def test_two_thousand_latents(kind):
    a, b = two(kind, 2048, 2048, 96)
    found = assign(a, b)
    assert found.total == pytest.approx(dense(a, b), abs=1e-7) and found.gap <= 1e-9


@pytest.mark.quick
@pytest.mark.parametrize("candidates", [1, 2, 500])
def test_the_number_of_candidates_changes_no_result(candidates):
    a, b = two("clusters", 200, 200, 12)
    assert assign(a, b, candidates=candidates).total == pytest.approx(dense(a, b), abs=1e-9)


@pytest.mark.quick
def test_float32_similarities_pay_for_their_rounding_in_the_gap(monkeypatch):
    a, b = two("shared", 300, 300, 24)
    monkeypatch.setattr(assignment, "EXACT", 0.0)
    found = assign(a, b)
    best = dense(a, b)
    assert found.total == pytest.approx(best, abs=1e-4) and found.total <= best + 1e-9 <= found.bound + 1e-9
    assert 0 < found.gap < 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("m", [300, 360])
@pytest.mark.parametrize("kind", ["clusters", "random"])
def test_a_search_that_is_cut_short_still_bounds_the_best_total(kind, m):
    """What is left is the greedy matching: at least half of the best, on any non-negative weights (Avis 1983)."""
    a, b = two(kind, 300, m, 16)
    found = assign(a, b, seconds=1e-9)
    best = dense(a, b)
    assert found.stopped and found.passes == 2
    assert 0.5 * best <= found.total <= best + 1e-9 and best <= found.bound + 1e-9
    assert "stopped by the time budget" in found.said
    assert len(set(found.partner_N)) == 300


@pytest.mark.quick
def test_a_gap_that_is_good_enough_ends_the_search():
    a, b = two("clusters", 300, 300, 16)
    rough, exact = assign(a, b, gap=0.5), assign(a, b)
    assert rough.passes < exact.passes and rough.gap <= 0.5 and not rough.stopped


@pytest.mark.quick
def test_small_blocks_give_the_same():
    a, b = two("shared", 130, 130, 16)
    assert assign(a, b, memory=2**14).total == pytest.approx(assign(a, b).total, abs=1e-10)


@pytest.mark.quick
def test_zero_rows_match_last_and_broken_rows_are_refused():
    a, b = two("shared", 40, 40, 8)
    a[3] = 0
    found = assign(a, b)
    assert found.similarity_N[3] == 0 and found.total == pytest.approx(dense(a, b), abs=1e-9)
    a[5, 2] = float("nan")
    with pytest.raises(StageFailed, match="not finite"):
        assign(a, b)
    with pytest.raises(StageFailed, match="cannot be matched"):
        assign(a[:, :4], b)
