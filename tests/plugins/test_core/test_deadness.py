"""Effective tokens, the 95 % bound on a silent latent's rate, and its errors, on synthetic firing of known rate and burstiness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saehub_native.evaluate.accumulate import FiringCounts
from saehub_native.evaluate.deadness import budget, silent_share

S, T = 256, 128


def firing(rates: np.ndarray, bursts: np.ndarray, seed: int) -> np.ndarray:
    """bool [F, S, T]: a two-state Markov chain a latent and sequence, stationary rate r, mean burst length m (1/m leaves, r/(m(1-r)) enters)."""
    rng = np.random.default_rng(seed)
    leave, enter = 1 / bursts[:, None], (rates / (bursts * (1 - rates)))[:, None]
    independent = bursts[:, None] == 1  # a chain that always leaves cannot fire twice in a row; independent rows can
    on = rng.random((len(rates), S)) < rates[:, None]
    found = np.empty((len(rates), S, T), bool)
    for t in range(T):
        found[:, :, t] = on
        draw = rng.random(on.shape)
        on = np.where(independent, draw < rates[:, None], np.where(on, draw >= leave, draw < enter))
    return found


def counts(fired_FST: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return fired_FST.sum((1, 2)), fired_FST.any(2).sum(1)


@pytest.mark.quick
def test_independent_rows_count_in_full():
    """Every firing a burst of its own: N = n, and 3/N is the rule of three (Clopper-Pearson's bound for no success in N is 1 - 0.05^(1/N))."""
    found = budget(np.array([0] * 50 + [1] * 30 + [2] * 20), np.array([0] * 50 + [1] * 30 + [2] * 20), 100_000, 1000)
    assert found.tokens == pytest.approx(100_000) and found.burst == pytest.approx(1)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 100_000), rel=2e-3)
    assert found.decides(1e-4) and not found.decides(1e-5)
    assert "undecided at this budget" in found.undecided(1e-5) and "300,000" in found.undecided(1e-5)


@pytest.mark.quick
def test_equal_bursts_divide_the_tokens():
    fired, sequences = np.array([7, 14, 21] * 10), np.array([1, 2, 3] * 10)
    assert budget(fired, sequences, 70_000, 1000).tokens == pytest.approx(10_000)


@pytest.mark.quick
def test_mixed_bursts_solve_the_defining_equation():
    fired, sequences = np.array([1] * 20 + [10] * 20), np.ones(40, int)
    x = -math.log(0.05) * 50_000 / budget(fired, sequences, 50_000, 1000).tokens
    assert 0.5 * math.exp(-x) + 0.5 * math.exp(-x / 10) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.quick
def test_nothing_fired_counts_sequences():
    found = budget(np.zeros(8, int), np.zeros(8, int), 12_800, 100)
    assert found.tokens == 100 and found.latents == 0
    assert budget(np.zeros(8, int), np.zeros(8, int), 0, 0).bound == math.inf


@pytest.mark.parametrize("name, burst", [("independent", 1.0), ("bursts of 3", 3.0), ("bursts of 12", 12.0), ("mixed", None)])
def test_the_95_percent_bound_covers(name, burst):
    """A population of latents gives N; others of the same burstiness whose true rate is 3/N stay silent in at most 5 % of cases."""
    rng = np.random.default_rng(3)
    mixed = lambda n: rng.choice([1.0, 2.0, 6.0, 20.0], n) if burst is None else np.full(n, burst)  # noqa: E731
    bursts = mixed(500)
    population = firing(np.minimum(10 ** rng.uniform(-5.5, -1, 500), 0.3), bursts, 1)
    found = budget(*counts(population), S * T, S)
    n = 1500
    at_bound = firing(np.full(n, found.bound), mixed(n), 2)
    silent = 1 - at_bound.any((1, 2)).mean()
    noise = 3 * (0.05 * 0.95 / n) ** 0.5
    assert silent <= 0.05 + noise, (silent, found)
    if burst == 1.0:
        assert found.tokens == pytest.approx(S * T, rel=0.1) and silent >= 0.05 - 2 * noise  # and it gives nothing away
        return
    # Counting rows, or dividing them by the mean burst where bursts differ, would promise too much: that is what N is for.
    naive = 1 - firing(np.full(n, 3 / (S * T)), mixed(n), 4).any((1, 2)).mean()
    assert naive > 0.2
    if burst is None:
        assert 1 - firing(np.full(n, 3 * bursts.mean() / (S * T)), mixed(n), 5).any((1, 2)).mean() > 0.05 + noise
    else:
        assert S * T / (3 * burst) < found.tokens < S * T / burst * 1.1


def test_chunks_and_order_give_the_same_counts():
    fired_FST = firing(10 ** np.random.default_rng(0).uniform(-4, -1, 40), np.full(40, 4.0), 5)
    acts_NF = torch.from_numpy(fired_FST.transpose(1, 2, 0).reshape(S * T, 40).astype(np.float32)) * 0.7
    units_N = torch.arange(S).repeat_interleave(T)
    dense, sparse = FiringCounts(40), FiringCounts(40)
    for at in range(0, S * T, 75):  # chunks begin anywhere inside sequences
        part = slice(at, at + 75)
        dense.add_dense(acts_NF[part], units_N[part])
        width = int((acts_NF[part] != 0).sum(1).max())
        values, order = acts_NF[part].topk(width, dim=1)
        sparse.add_sparse(torch.where(values != 0, order, -1), units_N[part])
    fired, sequences = counts(fired_FST)
    last = np.where(sequences > 0, S - 1 - fired_FST.any(2)[:, ::-1].argmax(1), -1)
    for found in (dense, sparse):
        assert found.rows == S * T
        assert np.array_equal(found.fired_F, fired) and np.array_equal(found.sequences_F, sequences) and np.array_equal(found.last_F, last)


@pytest.mark.quick
def test_error_of_the_silent_share_is_the_jackknife():
    rng = np.random.default_rng(2)
    fired_FS = rng.random((300, 40)) < 10 ** rng.uniform(-3, -1, (300, 1))
    last = np.where(fired_FS.any(1), 39 - fired_FS[:, ::-1].argmax(1), -1)
    share, stderr, alone = silent_share(fired_FS.sum(1), last, np.arange(40))
    left_out = [1 - np.delete(fired_FS, j, axis=1).any(1).mean() for j in range(40)]
    assert share == pytest.approx(1 - fired_FS.any(1).mean())
    assert stderr == pytest.approx((39 / 40 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum()) ** 0.5)
    assert np.array_equal(alone, [(fired_FS[:, j] & (fired_FS.sum(1) == 1)).sum() for j in range(40)])
    assert silent_share(fired_FS.sum(1), last, np.arange(1))[1] is None


@pytest.mark.quick
def test_shares_appear_where_the_budget_allows(context, measure, fitted):
    saes = {"a": (fitted(d_sae=220, k=2), "resid_post.0", None)}  # some of them stay silent
    small = measure(context(saes))["a", "in_sample", "dead_share"]
    assert small.status == "not_measured" and "undecided at this budget" in small.reason and small.parts["effective_tokens"] > 0
    found = measure(context(saes), dead_rate=0.5)
    row, fact = found["a", "in_sample", "dead_share"], found["a", "in_sample", "never_fired_share"]
    assert row.status == "ok" and row.value == fact.value and "r0 = 0.5" in row.note
    assert found["a", "in_sample", "dead_share@1e-05"].status == "not_measured"
    awake = measure(context({"a": (fitted(), "resid_post.0", None)}))["a", "in_sample", "dead_share"]
    assert (awake.status, awake.value, awake.parts["silent"]) == ("ok", 0.0, 0) and "every latent fired" in awake.note and awake.parts["bound"] > 1e-5
    assert sum(fact.parts["only_in_sequence"]) >= 0 and len(fact.parts["only_in_sequence"]) == 23
