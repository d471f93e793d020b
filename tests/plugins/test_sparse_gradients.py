"""The sparse architectures against float64 dense autograd, each as autoencoder, transcoder and skip transcoder; their selections and thresholds."""

from __future__ import annotations

import pytest
import torch

from saehub.api import Job
from saehub_native.architectures.abstopk import AbsTopK
from saehub_native.architectures.batchtopk import BatchTopK
from saehub_native.architectures.groupmax import GroupMax
from saehub_native.architectures.matryoshka import Matryoshka
from saehub_native.architectures.topk import TopK
from saehub_native.config import AbsTopKConfig, BatchTopKConfig, GroupMaxConfig, MatryoshkaConfig, TopKConfig
from saehub_native.kernels.cpu import CpuKernels
from saehub_native.kernels.lazy import RowSums
from saehub_native.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.quick

F, K, K_AUX, MARGIN = 120, 6, 9, 1e-3
KINDS = {"autoencoder": (20, 20, False), "transcoder": (20, 14, False), "skip_transcoder": (14, 20, True)}
CLASSES = {
    "topk": (TopK, TopKConfig),
    "abstopk": (AbsTopK, AbsTopKConfig),
    "groupmax": (GroupMax, GroupMaxConfig),
    "batchtopk": (BatchTopK, BatchTopKConfig),
    "matryoshka": (Matryoshka, MatryoshkaConfig),
}


def build(name: str, kind: str, seed: int = 0, kernels=ReferenceKernels, **settings):
    """An architecture, moved parameters, rows and targets; everything float32."""
    d_in, d_out, skip = KINDS[kind]
    g = torch.Generator().manual_seed(seed)
    job = Job("j", "resid_post.1", None if kind == "autoencoder" else "mlp_out.1", d_in, d_out, steps=10, batch=64, rows=640, seed=0)
    cls, make = CLASSES[name]
    config = make(**{"k": K, "width": F, "batch": 64, "k_aux": K_AUX, "auxk_alpha": 0.25, "revive": 0.01, "skip": skip} | settings)
    assert list(config.check(job)) == []
    architecture = cls(config, job, kernels())
    x = torch.randn(400, d_in, generator=g) + 0.5
    y = x if kind == "autoencoder" else torch.randn(400, d_out, generator=g) - 0.3
    params = architecture.init(x[:200], y[:200], g)
    for parameter in params.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return architecture, params, x, y, g


def chosen(name: str, pre, k: int):
    """bool [B, F], written from the definitions with sorts over dense float64 pre-activations."""
    if name == "topk":
        return torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.argsort(1, descending=True)[:, :k], True)
    if name == "abstopk":
        return torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.abs().argsort(1, descending=True)[:, :k], True)
    if name == "groupmax":
        grouped = pre.view(len(pre), k, -1)
        return (grouped == grouped.amax(2, keepdim=True)).view_as(pre)
    return pre >= pre.flatten().sort(descending=True).values[k * len(pre) - 1]


def margin_rows(name: str, pre, dead_F, k: int):
    """Rows in which no choice and no sign is within MARGIN of turning."""
    ranked = pre.abs() if name == "abstopk" else pre
    ok = torch.ones(len(pre), dtype=torch.bool)
    if name in ("topk", "abstopk"):
        top = ranked.topk(k + 1, dim=1).values
        ok &= top[:, k - 1] - top[:, k] > MARGIN
    elif name == "groupmax":
        top = pre.view(len(pre), k, -1).topk(2, dim=2).values
        ok &= (top[..., 0] - top[..., 1]).amin(1) > MARGIN
    elif -pre.flatten().sort(descending=True).values[k * len(pre) - 1 : k * len(pre) + 1].diff() < 2e-5:
        ok[0] = False  # a batch has one cut: another batch has another one
    dead = ranked[:, dead_F].topk(K_AUX + 1, dim=1).values
    ok &= (dead[:, K_AUX - 1] - dead[:, K_AUX] > MARGIN) & (dead.abs().amin(1) > MARGIN)
    return ok & (pre.abs() * chosen(name, pre, k) + ~chosen(name, pre, k)).gt(MARGIN).all(1)


def dense_loss(name: str, p, x, y, dead_F, k: int, subtract: bool, variance: float, ends: list[int], alpha: float = 0.25):
    """The loss from the published equations, dense, for autograd."""
    pre = (x - p["b_dec"] if subtract else x) @ p["W_enc"].T + p["b_enc"]
    keep = chosen(name, pre.detach(), k)
    act = (lambda v: v) if name == "abstopk" else torch.relu
    f = act(pre) * keep
    linear = x @ p["W_skip"].T if "W_skip" in p else 0
    full = f @ p["W_dec"] + p["b_dec"] + linear
    prefixes = [f[:, :end] @ p["W_dec"][:end] + p["b_dec"] + linear for end in ends]
    loss = sum((part - y).pow(2).sum() for part in prefixes) / len(prefixes) / (len(x) * variance)
    e = (y - full).detach()
    ranked = (pre.abs() if name == "abstopk" else pre).detach().masked_fill(~dead_F, -torch.inf)
    aux_keep = torch.zeros_like(keep).scatter(1, ranked.topk(K_AUX, dim=1).indices, True)
    loss = loss + alpha * (act(pre) * aux_keep @ p["W_dec"] - e).pow(2).sum() / (e - e.mean(0)).pow(2).sum()
    return loss - 0.01 * p["b_enc"][dead_F].sum(), full, f


def lazy_kernels():
    """The compiled kernels, as a session sets them."""
    kernels = CpuKernels()
    kernels.lazy = True
    return kernels


@pytest.mark.parametrize("kernels", [ReferenceKernels, lazy_kernels])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_gradient_equals_float64_dense_autograd(name, kind, kernels):
    architecture, params, x, y, g = build(name, kind, kernels=kernels)
    dead_F = torch.zeros(F, dtype=torch.bool)
    dead_F[torch.randperm(F, generator=g)[:40]] = True
    params["b_enc"][dead_F] -= 0.0 if name == "abstopk" else 0.4  # so that some dead latents do not fire in this batch
    params["W_enc"][dead_F] *= 0.4 if name == "abstopk" else 1.0
    exact = {n: p.double().requires_grad_() for n, p in params.items()}
    subtract = kind == "autoencoder"

    def pre(rows):
        return ((rows.double() - exact["b_dec"] if subtract else rows.double()) @ exact["W_enc"].T + exact["b_enc"]).detach()

    for _ in range(20):  # the cut of a batch moves when rows leave it
        ok = margin_rows(name, pre(x), dead_F, K)
        x, y = x[ok], y[ok]
        if ok.all():
            break
    assert ok.all() and len(x) >= 60
    before = [t.clone() for t in (x, y, *params.values())]
    result = architecture.gradients(params, x, y, dead_F)
    if kernels is lazy_kernels:
        assert type(result.grads["W_enc"]) is type(result.grads["W_dec"]) is RowSums
        result.grads |= {name: result.grads[name].dense() for name in ("W_enc", "W_dec")}

    ends = architecture.config.prefix_ends(architecture.job) if name == "matryoshka" else [F]
    loss, full, f = dense_loss(name, exact, x.double(), y.double(), dead_F, K, subtract, architecture.constants["variance"], ends)
    loss.backward()
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(result.residual_BD.double(), y.double() - full.detach(), atol=1e-5)
    assert float(result.squared_error) == pytest.approx(float((full.detach() - y.double()).pow(2).sum()), rel=1e-5)
    assert float(result.l0) == pytest.approx(float((f != 0).sum(1).double().mean()), abs=1e-5)
    assert torch.equal(result.fired_F, (f != 0).any(0))
    assert set(result.grads) == set(params)
    for n, p in exact.items():
        error = float((result.grads[n].double() - p.grad).norm() / p.grad.norm())
        assert error <= 1e-5, f"{n}: {error:.1e}"
    quiet = dead_F & ~result.fired_F
    assert quiet.any() and float(result.grads["W_enc"][quiet].norm()) > 0, "AuxK must reach the encoder of latents that did not fire"
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, *params.values()), strict=True))


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_the_threshold_lets_k_a_row_of_the_calibration_rows_through(name):
    architecture, params, x, _, _ = build(name, "autoencoder")
    threshold = architecture.export(params, x)[1]["threshold"]
    p = {n: t.double() for n, t in params.items()}
    pre = (x.double() - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    assert int((pre > float(threshold)).sum()) == K * len(x)
    few = -10 * torch.ones_like(params["b_enc"])
    assert float(architecture.export(params | {"b_enc": few}, x)[1]["threshold"]) == 0.0


def test_batch_selection_equals_sorting_whatever_was_seen_before():
    """Rows of very different fullness, ties at zero, and a batch in which one row takes every latent that it has."""
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(90, 10, generator=g), torch.randn(F, 10, generator=g), 0.1 * torch.randn(F, generator=g)
    kernels, fresh = ReferenceKernels(), ReferenceKernels()
    kernels.encode_select_batch(3 * x.flip(0), W, b, 17)
    for rows, k in ((x, 5), (x * torch.linspace(0, 6, 90)[:, None], 5), (x * (torch.arange(90) == 7)[:, None] * 50, 1), (x, F)):
        values, indices = kernels.encode_select_batch(rows, W, b, k)
        pre = torch.addmm(b, rows, W.t()).relu()
        cut = pre.flatten().sort(descending=True).values[k * 90 - 1]
        expected = torch.where(pre >= cut, pre, 0)
        assert torch.equal(torch.zeros(90, F).scatter(1, indices, values), expected)
        assert values.shape[1] == max(1, int((expected > 0).sum(1).max()))
        assert all(len(set(row.tolist())) == len(row) for row in indices)
        again = fresh.encode_select_batch(rows, W, b, k)
        assert torch.equal(again[0], values) and torch.equal(torch.where(values > 0, again[1], -1), torch.where(values > 0, indices, -1))


def test_k_falls_to_its_end_and_is_there_without_a_step():
    architecture, params, x, y, _ = build("topk", "autoencoder", k_anneal=0.5, k_start=26)
    assert [architecture.k(step) for step in (0, 1, 2, 4, 5, 9)] == [26, 22, 18, 10, 6, 6] and architecture.k(None) == 6
    result = architecture.gradients(params, x, y, torch.zeros(F, dtype=torch.bool), step=1)
    assert result.extra == {"k": 22.0} and 15 < float(result.l0) <= 22
    assert build("batchtopk", "autoencoder", k_anneal=0.2)[0].k(0) == 4 * K


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (GroupMaxConfig, dict(k=7), "does not divide the 120 latents"),
        (GroupMaxConfig, dict(k_anneal=0.5), "groups of groupmax are fixed"),
        (TopKConfig, dict(k_anneal=2.0), "k_anneal is 2"),
        (TopKConfig, dict(k_start=50), "needs k_anneal"),
        (TopKConfig, dict(k_anneal=0.5, k_start=500), "k_start is 500"),
        (TopKConfig, dict(skip=True), "name a target_site"),
        (MatryoshkaConfig, dict(prefixes=(0.5,)), "the last one is 1"),
        (MatryoshkaConfig, dict(prefixes=(0.5, 0.25, 1.0)), "more than the one before"),
        (MatryoshkaConfig, dict(prefixes=()), "the last one is 1"),
    ],
)
def test_settings_that_cannot_work_are_named(make, settings, words):
    job = Job("j", "resid_post.1", None, 20, 20, steps=10, batch=1024, rows=10240, seed=0)
    problems = list(make(**{"k": K, "width": F} | settings).check(job))
    assert len(problems) == 1 and words in problems[0], problems
