"""PCA and the random dictionary against numpy's own decompositions, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saehub_native.evaluate.accumulate import RowMoments
from saehub_native.evaluate.baselines import PCA, RandomDictionary

pytestmark = pytest.mark.quick


def halves(x_ND, units_N):
    found = (RowMoments(x_ND.shape[1], x_ND.device, outer=True), RowMoments(x_ND.shape[1], x_ND.device, outer=True))
    for start in range(0, len(x_ND), 37):
        for half in (0, 1):
            part = x_ND[start : start + 37]
            found[half].add(part[torch.from_numpy(units_N[start : start + 37] % 2 == half)])
    return found


def svd_fit(x, k):
    mean = x.mean(0)
    top = np.linalg.svd(x - mean, full_matrices=False)[2][:k]
    return lambda y: mean + (y - mean) @ top.T @ top


def test_pca_is_fitted_on_the_other_half():
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, 12, generator=draw) @ torch.randn(12, 12, generator=draw) + 100
    units_N = np.arange(400) // 8
    x, odd = x_ND.double().numpy(), units_N % 2 == 1
    pca = PCA(halves(x_ND, units_N))
    expected = np.empty_like(x)
    expected[odd], expected[~odd] = svd_fit(x[~odd], 5)(x[odd]), svd_fit(x[odd], 5)(x[~odd])
    assert np.allclose(pca.reconstruct(x_ND, units_N, 5, own=True), expected, atol=1e-6)
    assert np.allclose(pca.reconstruct(x_ND + 1, units_N, 5, own=False), svd_fit(x, 5)(x + 1), atol=1e-6)
    assert np.allclose(pca.reconstruct(x_ND, units_N, 12, own=False), x, atol=1e-6)


def test_random_dictionary_is_least_squares_on_its_choice():
    draw = torch.Generator().manual_seed(1)
    x_ND = torch.randn(50, 16, generator=draw)
    mean_D = x_ND.double().mean(0)
    found = RandomDictionary.make(mean_D, 40, 5, seed=3)
    assert torch.allclose(found.W_FD.norm(dim=1), torch.ones(40))
    rebuilt = found.reconstruct(x_ND, memory=2**20).numpy()
    assert np.allclose(rebuilt, found.reconstruct(x_ND, memory=1).numpy(), atol=1e-9)  # one row at a time
    W = found.W_FD.double().numpy()
    for x, row in zip(x_ND.double().numpy() - mean_D.numpy(), rebuilt - mean_D.numpy(), strict=True):
        chosen = np.argsort(-(W @ x))[:5]
        weights = np.linalg.lstsq(W[chosen].T, x, rcond=None)[0]
        assert np.allclose(row, weights @ W[chosen], atol=1e-6)


def test_random_dictionary_depends_on_the_seed_alone():
    mean_D = torch.zeros(8, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(RandomDictionary.make(mean_D, 20, 3, 1).W_FD, RandomDictionary.make(mean_D, 20, 5, 1).W_FD)
    assert not torch.equal(RandomDictionary.make(mean_D, 20, 3, 1).W_FD, RandomDictionary.make(mean_D, 20, 3, 2).W_FD)
    assert torch.equal(torch.get_rng_state(), state)
    x_ND = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RandomDictionary.make(mean_D, 20, 8, 1).reconstruct(x_ND, 2**20), x_ND.double())  # d directions span everything


def test_baselines_of_a_run_equal_whole_tensor_references(context, measure, fitted, datasets, activations):
    found = measure(context({"a": (fitted(), "resid_post.0", None)}))
    inside, outside = datasets["in_sample"], datasets["out_of_sample"]

    def rows(dataset):
        keep = dataset.tokens.keep_ST
        return activations(dataset, "resid_post.0")[keep].double().numpy(), np.arange(len(keep)).repeat(keep.sum(1).numpy())

    (x, units), (other, _) = rows(inside), rows(outside)

    def fvu(y, yhat):
        return ((y - yhat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()

    odd = units % 2 == 1
    expected = np.empty_like(x)
    expected[odd], expected[~odd] = svd_fit(x[~odd], 6)(x[odd]), svd_fit(x[odd], 6)(x[~odd])
    assert found["a", "in_sample", "fvu_pca"].value == pytest.approx(fvu(x, expected), rel=1e-6)
    assert found["a", "out_of_sample", "fvu_pca"].value == pytest.approx(fvu(other, svd_fit(x, 6)(other)), rel=1e-6)
    random = RandomDictionary.make(torch.from_numpy(x.mean(0)), 64, 6, 7)
    assert found["a", "out_of_sample", "fvu_random"].value == pytest.approx(fvu(other, random.reconstruct(torch.from_numpy(other), 2**20).numpy()), rel=1e-5)
    assert found["a", "in_sample", "fvu_random"].note == "k = 6" and found["a", "in_sample", "ce_recovered_zero_pca"].status == "ok"


def test_k_is_given_declared_or_measured(context, measure, fitted):
    from saehub.testing.saes import random_sae

    saes = {"topk": (fitted(), "resid_post.0", None), "relu": (random_sae("relu", d_in=32, d_sae=80), "resid_post.0", None)}
    found = measure(context(saes))
    assert found["topk", "in_sample", "fvu_pca"].note == "k = 6"
    assert found["relu", "in_sample", "fvu_pca"].note == f"k = {min(round(found['relu', 'in_sample', 'l0'].value), 32)}"
    assert measure(context(saes), pca_k=3)["relu", "in_sample", "fvu_pca"].note == "k = 3"


def test_the_identity_recovers_everything_and_only_what_was_asked_for_is_beside(context, measure, fitted):
    saes = {"a": (fitted(), "resid_post.0", None)}
    found = measure(context(saes), baselines=("identity", "pca"))
    for dataset in ("in_sample", "out_of_sample"):
        assert found["a", dataset, "fvu_identity"].value == 0 and found["a", dataset, "fvu_identity"].note is None
        for metric in ("ce_recovered_zero", "ce_recovered_mean"):
            assert found["a", dataset, f"{metric}_identity"].value == pytest.approx(1, abs=1e-6)
        assert ("a", dataset, "fvu_random") not in found
    usual = measure(context(saes))
    assert found["a", "out_of_sample", "fvu_pca"].value == usual["a", "out_of_sample", "fvu_pca"].value and ("a", "in_sample", "fvu_identity") not in usual
