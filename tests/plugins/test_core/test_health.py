"""`native/health` against scipy, closed forms, Monte Carlo, sae_lens.evals and dictionary_learning.evaluation, on a tiny model's rows."""

from __future__ import annotations

import copy
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from scipy.integrate import quad
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import jaccard

from saehub_native.health import geometry
from saehub_native.health.config import HealthConfig
from saehub_native.health.evaluator import HealthEvaluator, library_window

os.environ.setdefault("WANDB_MODE", "disabled")
SITE = "resid_post.0"


@pytest.fixture
def health():
    """Run `native/health`: `found["sae", "in_sample", "cofiring"]`."""

    def run(context, **settings):
        rows = HealthEvaluator(HealthConfig(**settings)).evaluate(context)
        found = {(row.subjects[0], row.dataset, row.metric): row for row in rows}
        assert len(found) == len(rows)
        return found

    return run


# ---------------------------------------------------------------------- geometry
@pytest.mark.quick
@pytest.mark.parametrize("latents, width", [(2, 2), (5, 3), (96, 8), (1280, 160), (400, 4096), (131_072, 768)])
def test_the_null_is_the_integral_over_the_exact_law_of_a_cosine(latents, width):
    """cos ~ 2 Beta((d-1)/2, (d-1)/2) - 1; E max = 1 - ∫ P(cos ≤ c)^(F-1) dc, by scipy."""
    law = stats.beta((width - 1) / 2, (width - 1) / 2)
    centre = 0.0 if latents < 10 else math.sqrt(2 * math.log(latents) / width)  # where the integrand turns from 0 to 1
    points = [p for p in (-0.5, 0.0, centre, min(2 * centre, 0.99)) if -1 < p < 1]
    upper, _ = quad(lambda c: law.cdf((c + 1) / 2) ** (latents - 1), -1, 1, points=sorted(set(points)), limit=500)
    mean, spread = geometry.random_maximum(latents, width)
    assert mean == pytest.approx(1 - upper, abs=2e-5)
    assert 0 < spread < 1


@pytest.mark.quick
def test_the_null_is_what_random_dictionaries_give_and_its_error_covers_them():
    draw = torch.Generator().manual_seed(0)
    seen = [geometry.neighbours(torch.randn(300, 24, generator=draw), 0.9, 2**20).redundancy for _ in range(60)]
    mean, spread = geometry.random_maximum(300, 24)
    bound = math.sqrt(2 / 300) * spread
    assert np.mean(seen) == pytest.approx(mean, abs=4 * np.std(seen) / math.sqrt(60))
    assert np.std(seen) < bound


@pytest.mark.quick
def test_the_null_in_one_and_two_dimensions():
    assert geometry.random_maximum(4, 1) == (1 - 2 / 8, pytest.approx(math.sqrt(1 - 0.75**2)))  # some other of three has the same sign
    assert geometry.random_maximum(2, 2)[0] == pytest.approx(0, abs=1e-9)  # one other angle, uniform
    assert geometry.random_maximum(1, 7) == (0.0, 0.0)


@pytest.mark.quick
def test_published_nulls():
    """notes on the essay's widths: 0.046 (400 latents) and 0.051 (1,200) at d = 4,096; 0.130 for 4,096 latents at d = 768."""
    for latents, width, published in ((400, 4096, 0.046), (1200, 4096, 0.051), (4096, 768, 0.130)):
        assert geometry.random_maximum(latents, width)[0] == pytest.approx(published, abs=5e-4)


@pytest.mark.quick
@pytest.mark.parametrize("memory", [2**20, 2**30])
def test_neighbours_are_those_of_the_whole_matrix(memory):
    draw = torch.Generator().manual_seed(3)
    W_FD = torch.randn(500, 12, generator=draw)
    W_FD[100:140] = W_FD[60:100] * 3 + 0.01 * torch.randn(40, 12, generator=draw)
    W_FD[140:150] = W_FD[100:110] + 0.01
    W_FD[7] = 0
    found = geometry.neighbours(W_FD, 0.9, memory)
    u = W_FD.double().numpy() / np.maximum(np.linalg.norm(W_FD.double().numpy(), axis=1, keepdims=True), 1e-30)
    cosines = u @ u.T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_allclose(found.cosine_F, cosines.max(1), atol=1e-6)
    near = cosines >= 0.9
    assert found.pairs == near.sum() // 2
    count, labels = connected_components(sparse.csr_matrix(near), directed=False)
    assert len(np.unique(found.cluster_F)) == count
    assert found.cluster_sizes() == sorted((int(n) for n in np.bincount(labels) if n > 1), reverse=True)
    i, j, best = found.closest(3)[0]
    assert best == pytest.approx(cosines.max(), abs=1e-6) and cosines[i, j] == pytest.approx(best, abs=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-38])
def test_redundancy_does_not_see_scale(scale):
    W_FD = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    found, plain = geometry.neighbours(W_FD * scale, 0.9, 2**20), geometry.neighbours(W_FD, 0.9, 2**20)
    assert found.cosine_F == pytest.approx(plain.cosine_F, abs=1e-5) and 0.5 < plain.redundancy < 1


@pytest.mark.quick
def test_one_latent_and_identical_latents():
    assert geometry.neighbours(torch.ones(1, 4), 0.9, 2**20).redundancy == 0.0
    same = geometry.neighbours(torch.ones(6, 4), 0.9, 2**20)
    assert same.redundancy == pytest.approx(1) and same.pairs == 15 and same.cluster_sizes() == [6]


# ---------------------------------------------------------------------- on rows
def test_health_of_a_plain_sae(health, context, fitted, datasets, activations):
    sae = fitted()
    found = health(context({"a": (sae, SITE, None)}))
    W = sae.W_dec.double().numpy()
    u = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosines = u @ u.T - 2 * np.eye(len(u))
    redundancy = found["a", None, "redundancy"]
    assert redundancy.value == pytest.approx(cosines.max(1).mean(), abs=1e-6)
    assert redundancy.stderr == pytest.approx(stats.sem(cosines.max(1)), rel=1e-5)
    assert redundancy.parts["null"] == found["a", None, "redundancy_null"].value == geometry.random_maximum(64, 32)[0]
    assert found["a", None, "expansion"].value == 2 and found["a", None, "finite_weights"].value == 1
    for name, dataset in datasets.items():
        x_ND = activations(dataset, SITE)[dataset.tokens.keep_ST]
        acts_NF, fired_NF = sae.encode(x_ND), (sae.encode(x_ND) != 0).numpy()
        rates_F, nearest_F = fired_NF.mean(0), cosines.argmax(1)
        assert found["a", name, "l0_share"].value == pytest.approx(fired_NF.mean(), rel=1e-6)
        assert found["a", name, "dense_share"].value == pytest.approx((rates_F > 0.1).mean())
        jaccards = [1 - jaccard(fired_NF[:, i], fired_NF[:, nearest_F[i]]) for i in np.flatnonzero(rates_F)]
        assert found["a", name, "cofiring"].value == pytest.approx(np.mean(jaccards), rel=1e-6)
        norms_N = (sae.decode(acts_NF, like=x_ND).norm(dim=1) / x_ND.norm(dim=1)).double()
        assert found["a", name, "norm_ratio"].value == pytest.approx(float(norms_N.mean()), rel=1e-5)
        assert found["a", name, "activation_norm"].value == pytest.approx(float(x_ND.norm(dim=1).double().mean()), rel=1e-6)
        first_F = np.where(fired_NF.any(0), fired_NF.argmax(0), len(fired_NF))
        curve = found["a", name, "waking_share"].parts["curve"]
        assert curve["rows"][-1] == len(fired_NF)
        np.testing.assert_allclose(curve["silent"], [(first_F >= n).mean() for n in curve["rows"]])
        late = (first_F >= len(fired_NF) / 2) & (first_F < len(fired_NF))
        assert found["a", name, "waking_share"].value == pytest.approx(late.mean())
        counted = {metric: (found["a", name, metric].n, found["a", name, metric].unit_of_n) for metric in ("dense_share", "cofiring", "waking_share", "l0_share")}
        sequences = int(dataset.tokens.keep_ST.any(1).sum())
        assert counted == {"dense_share": (len(fired_NF), "rows"), "cofiring": (len(jaccards), "latents"), "waking_share": (64, "latents"), "l0_share": (sequences, "sequences")}
    shift = found["a", "out_of_sample", "out_minus_in@norm_ratio"]
    a, b = (found["a", name, "norm_ratio"] for name in ("in_sample", "out_of_sample"))
    assert shift.value == b.value - a.value and shift.stderr == pytest.approx(math.hypot(a.stderr, b.stderr))


def test_the_peers_measure_the_same(health, context, fitted, datasets, activations):
    """encoder–decoder cosine of sae_lens.evals; frac_alive and l2_ratio of dictionary_learning.evaluation (one batch: it averages over batches)."""
    from dictionary_learning import evaluation
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from sae_lens import evals

    sae = fitted()
    sae = type(sae)(sae.config, {**sae.tensors(), "W_enc": sae.W_enc + 0.3 * torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(1))})
    found = health(context({"a": (sae, SITE, None)}))
    lens = SimpleNamespace(W_enc=sae.W_enc.clone(), W_dec=sae.W_dec.clone(), b_enc=sae.b_enc.clone(), cfg=SimpleNamespace(architecture=lambda: "topk"))
    theirs = evals.get_featurewise_weight_based_metrics(lens)["encoder_decoder_cosine_sim"]
    assert found["a", None, "encoder_decoder_cosine"].value == pytest.approx(float(np.mean(theirs)), abs=1e-6)
    peer = AutoEncoderTopK(32, 64, 6)
    peer.load_state_dict({
        "encoder.weight": sae.W_enc.T.clone(), "encoder.bias": sae.b_enc.clone(), "decoder.weight": sae.W_dec.T.clone(), "b_dec": sae.b_dec.clone(),
        "k": torch.tensor(6), "threshold": torch.tensor(-1.0),
    })  # fmt: skip
    rows_ND = activations(datasets["in_sample"], SITE)[datasets["in_sample"].tokens.keep_ST]
    theirs = evaluation.evaluate(peer, iter([rows_ND]))
    assert found["a", "in_sample", "norm_ratio"].value == pytest.approx(theirs["l2_ratio"], rel=1e-5)
    assert found["a", "in_sample", "waking_share"].parts["curve"]["silent"][-1] == pytest.approx(1 - theirs["frac_alive"], abs=1e-6)


def test_deadness_is_native_cores_and_moves_with_the_conditions(health, measure, context, fitted, plain):
    from saehub.api import EvalDataset

    data = {"in_sample": EvalDataset("in_sample", plain.Tokens(90, 5), "h")}
    narrow, wide = fitted(d_sae=64), fitted(d_sae=220, k=2)
    saes = {"narrow": (narrow, SITE, None), "wide": (wide, SITE, None)}
    for rate in (0.2, 1e-5):  # decided, and undecided at this budget
        ours, core = health(context(saes, data=data), dead_rate=rate), measure(context(saes, data=data), loss=False, baselines=False, dead_rate=rate)
        for name in saes:
            left, right = ours[name, "in_sample", "dead_share"], core[name, "in_sample", "dead_share"]
            assert (left.value, left.stderr, left.status, left.reason, left.definition) == (right.value, right.stderr, right.status, right.reason, right.definition)
    assert ours["wide", "in_sample", "dead_share"].reason.startswith("undecided")
    silent = {name: ours[name, "in_sample", "waking_share"].parts["curve"]["silent"] for name in saes}
    assert all(np.greater_equal(silent["wide"], silent["narrow"])) and silent["wide"][8] > silent["narrow"][8] + 0.1  # fewer active of more latents
    assert all(np.diff(silent["wide"]) <= 0) and silent["wide"][0] > silent["wide"][-1]  # and fewer with more rows


def test_the_librarys_own_rule_is_read_from_the_checkpoint(health, context, fitted):
    sae = fitted()
    sae.provenance["trainer"] = {"component": "any/topk", "config": {"dead_after": 40}}
    found = health(context({"a": (sae, SITE, None)}))["a", "in_sample", "dead_share_library"]
    assert found.status == "ok" and "dead_after = 40" in found.note and 0 < found.value < 1
    assert library_window({"trainer": {"config": {"dead_feature_window": 100, "train_batch_size_tokens": 64}}})[0] == 6400
    assert library_window({})[0] == 10_000_000
    assert "10,000,000" in health(context({"a": (fitted(), SITE, None)}))["a", "in_sample", "dead_share_library"].reason


def test_planted_faults_are_seen(health, context, fitted):
    plain_sae, copies, broken = fitted(), fitted(), fitted()
    W = copies.W_dec.clone()
    W[32:] = W[:32]
    copies = type(copies)(copies.config, {**copies.tensors(), "W_dec": W, "W_enc": W.T.contiguous()})
    broken = copy.deepcopy(broken)
    broken.W_dec.data[0, 0] = math.nan
    small = fitted(d_sae=16, k=6)
    found = health(context({"plain": (plain_sae, SITE, None), "copies": (copies, SITE, None), "broken": (broken, SITE, None), "small": (small, SITE, None)}))
    assert found["copies", None, "duplicate_share"].value == 1 and found["copies", None, "duplicate_share"].parts["largest"][0] >= 2
    assert found["copies", None, "redundancy"].value > found["plain", None, "redundancy"].value
    assert found["broken", None, "redundancy"].status == "failed" and "W_dec" in found["broken", None, "redundancy"].reason
    assert found["broken", None, "finite_weights"].value < 1
    assert found["broken", "in_sample", "finite_share"].value < 1
    assert "undercomplete" in found["small", None, "expansion"].note and "not sparse" in found["small", "in_sample", "l0_share"].note
    assert found["plain", "in_sample", "l0_share"].note is None


@pytest.mark.quick
@pytest.mark.parametrize("setting, value", [("duplicate_cosine", 1.5), ("dense_rate", 0), ("curve_points", 1), ("memory", 10), ("pairs", -1)])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        HealthConfig(**{setting: value})
