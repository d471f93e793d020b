"""Standard errors against the bootstrap over sequences, and ratio arithmetic against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saehub.api import EvalDataset
from saehub_native.evaluate.metrics import complement, log_histogram, ratio


def bootstrap(draws, statistic, sequences, seed=0):
    """Standard deviation of `statistic` over resampled sets of sequences."""
    rng = np.random.default_rng(seed)
    return np.std([statistic(rng.integers(0, sequences, sequences)) for _ in range(draws)], axis=0)


@pytest.mark.quick
def test_a_mean_of_equal_sequences_has_the_usual_error():
    values = np.random.default_rng(0).normal(3, 2, 50)
    found = ratio(values, np.ones(50))
    assert found.value == pytest.approx(values.mean()) and found.stderr == pytest.approx(values.std(ddof=1) / 50**0.5)
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.959964 * found.stderr)
    other = complement(found)
    assert other.value == pytest.approx(1 - values.mean()) and other.stderr == found.stderr
    assert ratio(values[:1], np.ones(1)).stderr is None
    assert np.isnan(ratio(values, np.zeros(50)).value)


@pytest.mark.quick
def test_sequences_without_rows_change_nothing():
    a, b = np.array([1.0, 2, 3, 5]), np.array([2.0, 3, 4, 4])
    padded = ratio(np.insert(a, [1, 4], 0), np.insert(b, [1, 4], 0))
    assert (padded.value, padded.stderr, padded.n) == (ratio(a, b).value, ratio(a, b).stderr, 4)


def test_ratio_error_equals_the_bootstrap_and_covers():
    rng = np.random.default_rng(1)
    S, hits, truth = 200, 0, 2.0
    for trial in range(400):
        lengths = rng.integers(20, 60, S).astype(float)
        sums = truth * lengths + rng.normal(0, 1, S) * lengths**0.5 + rng.normal(0, 4, S)
        found = ratio(sums, lengths)
        hits += abs(found.value - truth) <= 1.959964 * found.stderr
        if trial == 0:
            spread = bootstrap(2000, lambda pick: sums[pick].sum() / lengths[pick].sum(), S)
            assert found.stderr == pytest.approx(spread, rel=0.06)
    assert 0.92 <= hits / 400 <= 0.98


def test_errors_of_the_real_metrics_equal_the_bootstrap(stage, context, measure, fitted, activations, plain):
    """Whole metrics are computed anew in every resample, means included: the errors of the means must not matter."""
    data = EvalDataset("in_sample", plain.Tokens(160, 5, exclude=True), "h")
    ids_ST, draw = data.tokens.ids_ST, torch.Generator().manual_seed(0)
    for t in range(1, plain.CONTEXT):  # text that the model predicts: its own
        with torch.no_grad():
            own_S = torch.multinomial(stage.model.hf(ids_ST[:, :t]).logits[:, -1].softmax(-1), 1, generator=draw)[:, 0]
        ids_ST[:, t] = torch.where(ids_ST[:, t] == plain.BOS, plain.BOS, own_S)
    data.tokens.keep_ST &= ids_ST != plain.BOS
    sae = fitted()
    found = measure(context({"a": (sae, "resid_post.0", None)}, data={"in_sample": data}, lm_batch=32))
    x_STD, keep_ST = activations(data, "resid_post.0"), data.tokens.keep_ST
    with torch.no_grad():
        yhat_STD, l0_ST = sae(x_STD).double(), (sae.encode(x_STD) != 0).sum(-1)
    x_STD = x_STD.double()
    parts = {name: (np.array(row.parts["numerator"]), np.array(row.parts["denominator"])) for (_, _, name), row in found.items() if "numerator" in row.parts}

    def statistics(pick):
        keep = keep_ST[pick]
        x, error = x_STD[pick][keep], (x_STD[pick] - yhat_STD[pick])[keep]
        total = (x - x.mean(0)).square().sum()
        return np.array([
            error.square().sum() / total,
            1 - (error - error.mean(0)).square().sum() / total,
            l0_ST[pick][keep].double().mean(),
            *(parts[name][0][pick].sum() / parts[name][1][pick].sum() for name in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "ce_clean")),
        ])  # fmt: skip

    spread = bootstrap(1000, statistics, 160)
    for name, expected in zip(("fvu", "explained_variance", "l0", "ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "ce_clean"), spread, strict=True):
        assert found["a", "in_sample", name].stderr == pytest.approx(expected, rel=0.15), name


@pytest.mark.quick
def test_histogram_counts_every_latent_once():
    rates = np.array([0, 0, 1e-9, 1e-4, 0.5, 1.0])
    found = log_histogram(rates, 8)
    assert found["never_fired"] == 2 and sum(found["counts"]) == 4 and found["latents"] == 6
    assert found["log10_edges"] == pytest.approx(range(-8, 1))
    assert found["counts"] == [1, 0, 0, 0, 1, 0, 0, 2]
