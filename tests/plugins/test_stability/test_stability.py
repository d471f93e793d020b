"""`native/stability` against scipy, planted answers and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saehub.api import CalibrationRows, EvalContext, EvalDataset, Job, Rows, Subject
from saehub.checkpoint.sae import SAE
from saehub.testing.saes import fit_to, random_sae
from saehub_native.evaluate.stability.config import StabilityConfig
from saehub_native.evaluate.stability.evaluator import StabilityEvaluator

pytestmark = pytest.mark.quick
SITE, D = "resid_post.0", 16


def rows(n: int = 1500, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=draw) * torch.linspace(0.4, 1.6, D) + 0.3


def permuted(sae: SAE, order: torch.Tensor, scale: float = 1.0) -> SAE:
    """The same latents (or some of them) in another order, with another scale of encoder and decoder."""
    t = sae.tensors()
    own = {"W_enc": t["W_enc"][:, order] / scale, "b_enc": t["b_enc"][order] / scale, "W_dec": t["W_dec"][order] * scale, "b_dec": t["b_dec"]}
    return SAE.build(replace(sae.config, d_sae=len(order)), own, sae.provenance)


@pytest.fixture
def measure(tmp_path) -> Callable[..., dict]:
    def run(saes: dict[str, SAE], x_ND: torch.Tensor | None = None, *, sites: dict[str, str] = {}, **settings) -> dict:  # noqa: B006
        x_ND = rows() if x_ND is None else x_ND

        def read(dataset: EvalDataset, wanted):
            for at in range(0, len(x_ND), 400):
                part = x_ND[at : at + 400]
                yield Rows({site: part for site in wanted}, torch.ones(len(part), dtype=torch.bool))

        subjects = [Subject(name, sae, Path("."), sites.get(name, SITE), None, f"hash-{name}") for name, sae in saes.items()]
        context = EvalContext(subjects, None, {"in_sample": EvalDataset("in_sample", None, "text")}, 3, "cpu", tmp_path, rows=read)
        found = StabilityEvaluator(StabilityConfig(**settings)).evaluate(context)
        table = {(row.subjects, row.metric): row for row in found}
        assert len(table) == len(found)
        return table

    return run


def cosines(a_FD: torch.Tensor, b_FD: torch.Tensor) -> np.ndarray:
    a_FD, b_FD = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (a_FD, b_FD))
    return (a_FD @ b_FD.T).numpy()


def test_all_numbers_of_a_pair_are_those_of_scipy(measure):
    a, b = fit_to(rows(), 60, 6, seed=1), fit_to(rows(), 60, 6, seed=2)
    t = b.tensors()
    t["W_enc"] = t["W_enc"] + 0.15 * torch.randn(t["W_enc"].shape, generator=torch.Generator().manual_seed(1))
    b = SAE.build(b.config, t)
    found = measure({"a": a, "b": b}, nulls=False)
    enc, dec = cosines(a.W_enc.T, b.W_enc.T), cosines(a.W_dec, b.W_dec)
    i, by_enc = linear_sum_assignment(enc, maximize=True)
    _, by_dec = linear_sum_assignment(dec, maximize=True)
    _, by_abs = linear_sum_assignment(np.abs(dec), maximize=True)
    value = {metric: row.value for (who, metric), row in found.items()}
    assert value["pw_mcc"] == pytest.approx(dec[i, by_dec].mean(), abs=1e-6)
    assert value["pw_mcc_abs"] == pytest.approx(np.abs(dec)[i, by_abs].mean(), abs=1e-6)
    assert value["encoder_mcc"] == pytest.approx(enc[i, by_enc].mean(), abs=1e-6)
    same = by_enc == by_dec
    assert 0 < same.mean() < 1 and value["index_agreement"] == pytest.approx(same.mean())
    assert value["cosine_where_agreed"] == pytest.approx(dec[i, by_dec][same].mean(), abs=1e-6)
    assert value["cosine_where_not"] == pytest.approx(dec[i, by_dec][~same].mean(), abs=1e-6)
    for name, threshold in (("shared_share", 0.7), ("shared_share@0.2", 0.2), ("shared_share@0.5", 0.5), ("shared_share@0.9", 0.9)):
        assert value[name] == pytest.approx((same & (enc[i, by_enc] > threshold) & (dec[i, by_dec] > threshold)).mean())
    row = found[("a", "b"), "pw_mcc"]
    assert row.stderr == pytest.approx(dec[i, by_dec].std(ddof=1) / np.sqrt(60), rel=1e-5) and row.n == 60
    assert value["assignment_gap"] < 1e-9 and "optimal" in row.note
    curve = found[("a", "b"), "shared_share"].parts["curve"]
    assert curve["y"] == sorted(curve["y"], reverse=True) and curve["y"][curve["x"].index(0.7)] == value["shared_share"]

    # By firing rate: groups of a's latents, counted here on the whole rows.
    rates = (a.encode(rows()) != 0).double().mean(0).numpy()
    order = np.argsort(rates, kind="stable")
    groups = np.array_split(order[rates[order] > 0], 5)
    for k, group in enumerate(groups, 1):
        assert value[f"pw_mcc_by_rate@{k}of5"] == pytest.approx(dec[i, by_dec][group].mean(), abs=1e-6)
    assert found[("a", "b"), "pw_mcc_by_rate@1of5"].dataset == "in_sample"


def test_the_same_features_in_another_order_are_all_shared(measure):
    a = fit_to(rows(), 48, 6)
    found = measure({"a": a, "b": permuted(a, torch.randperm(48, generator=torch.Generator().manual_seed(0)), scale=3.0)})
    value = {metric: row.value for (_, metric), row in found.items()}
    assert value["shared_share"] == value["index_agreement"] == value["shared_share@0.9"] == 1
    assert value["pw_mcc"] == pytest.approx(1, abs=1e-6) and value["pw_mcc_abs"] == pytest.approx(1, abs=1e-6)
    assert value["subspace_overlap@4"] == pytest.approx(1, abs=1e-9) and value["subspace_overlap_random@4"] == 4 / D
    assert found[("a", "b"), "cosine_where_not"].status == "not_measured"
    assert value["pw_mcc_random"] < 0.7 and value["shared_share_random"] < 0.5  # never 0 in 16 dimensions


def test_reversed_directions_count_for_the_absolute_mean_alone(measure):
    a = random_sae("topk", d_in=64, seed=1)
    t = a.tensors() | {"W_dec": -a.W_dec.detach()}
    value = {metric: row.value for (_, metric), row in measure({"a": a, "b": SAE.build(a.config, t)}, torch.randn(64, 64)).items()}
    assert value["pw_mcc_abs"] == pytest.approx(1, abs=1e-6)
    assert value["pw_mcc"] < 0.5 and value["shared_share"] == 0


def test_a_wider_sae_is_compared_over_the_narrower_ones_latents(measure):
    wide = fit_to(rows(), 60, 6)
    narrow = permuted(wide, torch.arange(20))
    for ids in (("wide", "narrow"), ("narrow", "wide")):
        found = measure({name: {"wide": wide, "narrow": narrow}[name] for name in ids}, nulls=False)
        assert found[ids, "shared_share"].value == 1 and found[ids, "shared_share"].n == 20


def test_three_seeds_and_what_is_found_nowhere(measure):
    a, b = fit_to(rows(), 40, 6, seed=1), fit_to(rows(), 40, 6, seed=2)
    half = torch.cat([torch.arange(20), torch.arange(20)])
    c_tensors = permuted(a, half).tensors()
    for name, axis in (("W_enc", 1), ("W_dec", 0)):  # c: twenty of a's latents, twenty of b's
        theirs = b.tensors()[name].narrow(axis, 0, 20)
        c_tensors[name] = torch.cat([a.tensors()[name].narrow(axis, 0, 20), theirs], axis)
    c = SAE.build(a.config, c_tensors)
    found = measure({"a": a, "b": b, "c": c}, nulls=False)
    assert {who for who, metric in found if metric == "shared_share"} == {("a", "b"), ("a", "c"), ("b", "c")}
    shared = {who: row.value for (who, metric), row in found.items() if metric == "shared_share"}
    over = found[("a", "b", "c"), "shared_share_over_pairs"]
    assert over.value == pytest.approx(np.mean(list(shared.values()))) and over.n == 3 and over.unit_of_n == "pairs"
    assert found[("c", "a", "b"), "found_nowhere_share"].value == 0
    assert 0 < found[("a", "b", "c"), "found_nowhere_share"].value <= 1 - shared["a", "c"]


def test_saes_of_other_sites_are_not_compared_and_say_so(measure):
    a, b = fit_to(rows(), 30, 6, seed=1), fit_to(rows(), 30, 6, seed=2)
    found = measure({"a": a, "b": b}, sites={"b": "mlp_out.0"})
    assert {who for who, _ in found} == {("a",), ("b",)}
    assert all(row.status == "not_measured" and "no other SAE" in row.reason for row in found.values())


def test_broken_tensors_are_failed_rows(measure):
    a, b = fit_to(rows(), 30, 6, seed=1), fit_to(rows(), 30, 6, seed=2)
    t = {name: tensor.clone() for name, tensor in b.tensors().items()}
    t["W_dec"][3, 2] = float("nan")
    found = measure({"a": a, "b": SAE.build(b.config, t)}, nulls=False)
    assert all(row.status == "failed" and "not finite" in row.reason for row in found.values())


def test_what_was_shared_before_training_stands_beside(measure):
    """Two runs of one seed begin alike: nothing of their likeness was learned."""
    from saehub_native.config import TopKConfig
    from saehub_native.train import NativeTrainer

    x_ND, saes = rows(), {}
    for name, job, seed in (("a", "sae", 0), ("twin", "sae", 0), ("other", "sae", 1)):
        config = TopKConfig(k=4, width=40, batch=100)
        session = NativeTrainer(config).open(Job(job, SITE, None, D, D, 20, 100, 2000, seed, len(x_ND)), CalibrationRows(2.0 * x_ND))
        for step in range(10):
            session.step(2.0 * x_ND[100 * step : 100 * step + 100])
        sae = session.finish().scale_input(2.0, 2.0)
        settings = {"k": 4, "width": 40, "batch": 100}
        sae.provenance.update(trainer={"component": "native/topk", "config": settings, "seed": seed, "job": job, "scale": 2.0}, data={"tokens_trained": 2000})
        saes[name] = sae
    found = measure(saes)
    assert found[("a", "twin"), "pw_mcc_init"].value == pytest.approx(1, abs=1e-6)
    assert found[("a", "twin"), "shared_share_init"].value == 1
    assert found[("a", "other"), "pw_mcc_init"].value < 0.9
    unknown = measure({"a": saes["a"], "x": fit_to(x_ND, 40, 4)})
    assert "does not say how its training began" in unknown[("a", "x"), "pw_mcc_init"].reason


@pytest.mark.parametrize("settings", [{"threshold": 1.5}, {"bins": 0}, {"seconds": 0.0}, {"gap": 1.0}, {"memory": 10}, {"candidates": 0}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        StabilityConfig(**settings)
