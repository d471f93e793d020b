"""Loss and gradients of the native architectures against float64 dense autograd; kernels against the plain formulas."""

from __future__ import annotations

import pytest
import torch

from saehub.api import Job
from saehub_native.architectures.topk import TopK
from saehub_native.config import TopKConfig
from saehub_native.kernels.reference import ReferenceKernels, select_top

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_job(d_in: int, d_out: int, batch: int = 64) -> Job:
    return Job("j", "resid_post.1", None if d_in == d_out else "mlp_out.1", d_in, d_out, steps=10, batch=batch, rows=10 * batch, seed=0)


def dense_loss(p: dict[str, torch.Tensor], x, y, dead_F, *, k, k_aux, alpha, subtract, variance, revive=0.0):
    """TopK with AuxK written densely from the paper's equations; the reference for everything below."""
    centred = x - p["b_dec"] if subtract else x
    pre = centred @ p["W_enc"].T + p["b_enc"]
    top = pre.topk(k, dim=1)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    x_hat = f @ p["W_dec"] + p["b_dec"]
    loss = (x_hat - y).pow(2).sum() / (x.shape[0] * variance)
    e = (y - x_hat).detach()
    n_dead = int(dead_F.sum())
    if n_dead and alpha:
        dead_pre = pre.masked_fill(~dead_F, -torch.inf).topk(min(k_aux, n_dead), dim=1)
        a = torch.zeros_like(pre).scatter(1, dead_pre.indices, dead_pre.values.relu())
        loss = loss + alpha * (a @ p["W_dec"] - e).pow(2).sum() / (e - e.mean(0)).pow(2).sum()
    return loss - revive * p["b_enc"][dead_F].sum(), x_hat, top


def rows_with_margin(p, x, k, k_aux, dead_F, subtract, margin=1e-3):
    """Rows whose k-th and (k+1)-th pre-activation (also among the dead) and whose selected values' signs are not within rounding."""
    pre = (x - p["b_dec"] if subtract else x) @ p["W_enc"].T + p["b_enc"]
    top = pre.topk(k + 1, dim=1).values
    ok = (top[:, k - 1] - top[:, k] > margin) & (top[:, :k].abs().amin(1) > margin)
    if int(dead_F.sum()) > k_aux:
        dead = pre.masked_fill(~dead_F, -torch.inf).topk(k_aux + 1, dim=1).values
        ok &= (dead[:, k_aux - 1] - dead[:, k_aux] > margin) & (dead[:, :k_aux].abs().amin(1) > margin)
    elif dead_F.any():
        ok &= pre[:, dead_F].abs().amin(1) > margin
    return ok


@pytest.mark.parametrize(
    ("d_in", "d_out", "latents", "k", "n_dead", "k_aux"),
    [
        (24, 24, 192, 8, 0, 12),
        (24, 24, 192, 8, 5, 12),  # fewer dead than k_aux: all of them
        (24, 24, 192, 8, 60, 12),  # more: top-k_aux among the dead
        (24, 24, 150, 40, 30, 7),  # no multiple of the group size, and k so large that some selected values are not positive
        (24, 16, 192, 8, 40, 12),  # transcoder, d_out below d_in
        (16, 24, 96, 4, 96, 8),  # transcoder, everything dead
    ],
)
def test_every_gradient_equals_float64_dense_autograd(d_in, d_out, latents, k, n_dead, k_aux):
    g = torch.Generator().manual_seed(latents + k + n_dead)
    job = make_job(d_in, d_out)
    config = TopKConfig(k=k, width=latents, k_aux=k_aux, auxk_alpha=0.25, revive=0.01)
    subtract = job.target_site is None
    x = torch.randn(700, d_in, generator=g) + 0.5
    y = x if subtract else torch.randn(700, d_out, generator=g) - 0.3
    kernels = ReferenceKernels()
    architecture = TopK(config, job, kernels)
    params = architecture.init(x[:200], y[:200], g)
    params["b_enc"] += 0.1 * torch.randn(latents, generator=g) - 0.4 * (k == 40)
    params["b_dec"] += 0.2 * torch.randn(d_out, generator=g)
    dead_F = torch.zeros(latents, dtype=torch.bool)
    dead_F[torch.randperm(latents, generator=g)[:n_dead]] = True

    if n_dead < latents:
        params["b_enc"][dead_F] -= 0.5  # so that some dead latents do not fire in this batch
    exact = {name: p.double().requires_grad_() for name, p in params.items()}
    ok = rows_with_margin({n: p.detach() for n, p in exact.items()}, x.double(), k, k_aux, dead_F, subtract)
    x, y = x[ok], y[ok]
    assert len(x) >= 60
    before = (x.clone(), y.clone(), {n: p.clone() for n, p in params.items()})
    result = architecture.gradients(params, x, y, dead_F)

    loss, x_hat, top = dense_loss(
        exact, x.double(), y.double(), dead_F,
        k=k, k_aux=k_aux, alpha=0.25, subtract=subtract, variance=architecture.constants["variance"], revive=0.01,
    )  # fmt: skip
    loss.backward()
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(result.squared_error) == pytest.approx(float((x_hat.detach() - y.double()).pow(2).sum()), rel=1e-5)
    assert float(result.l0) == pytest.approx(float((top.values > 0).sum(1).double().mean()), abs=1e-5)
    fired = torch.zeros(latents, dtype=torch.bool)
    fired[top.indices[top.values > 0]] = True
    assert torch.equal(result.fired_F, fired)
    for name, p in exact.items():
        error = (result.grads[name].double() - p.grad).norm() / p.grad.norm()
        assert float(error) <= 1e-5, f"{name}: {float(error):.1e}"
    if 0 < n_dead < latents and k != 40:  # AuxK reaches the encoder of latents that did not fire
        quiet = dead_F & ~fired
        assert quiet.any() and float(result.grads["W_enc"][quiet].norm()) > 0
    if k == 40:
        assert (top.values <= 0).any()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert all(torch.equal(params[n], before[2][n]) for n in params)


def test_projected_gradient_is_the_gradient_of_the_normalised_decoder():
    """d/dW of L(W/|W|) at |W| = 1 is the projection that `before_update` applies: autograd through the normalisation is the reference."""
    g = torch.Generator().manual_seed(1)
    job, config = make_job(20, 20), TopKConfig(k=4, width=64, auxk_alpha=0.0)
    architecture = TopK(config, job, ReferenceKernels())
    x = torch.randn(128, 20, generator=g)
    params = architecture.init(x, x, g)
    no_dead = torch.zeros(64, dtype=torch.bool)
    grads = architecture.gradients(params, x, x, no_dead).grads
    architecture.before_update(params, grads)
    exact = {name: p.double().requires_grad_() for name, p in params.items()}
    unit = exact | {"W_dec": exact["W_dec"] / exact["W_dec"].norm(dim=1, keepdim=True)}
    dense_loss(unit, x.double(), x.double(), no_dead, k=4, k_aux=1, alpha=0, subtract=True, variance=architecture.constants["variance"])[0].backward()
    error = (grads["W_dec"].double() - exact["W_dec"].grad).norm() / exact["W_dec"].grad.norm()
    assert float(error) <= 1e-5
    params["W_dec"] += 0.1 * torch.randn(64, 20, generator=g)
    architecture.after_update(params)
    assert torch.allclose(params["W_dec"].norm(dim=1), torch.ones(64), atol=1e-6)


@pytest.mark.parametrize(("latents", "k"), [(64, 1), (512, 16), (512, 32), (515, 16), (40, 40)])
def test_select_top_finds_what_sorting_finds(latents, k):
    pre = torch.randn(97, latents, generator=torch.Generator().manual_seed(k))
    values, indices = select_top(pre, k)
    expected = pre.sort(dim=1, descending=True)
    assert torch.equal(values.sort(dim=1, descending=True).values, expected.values[:, :k])
    assert torch.equal(indices.sort(dim=1).values, expected.indices[:, :k].sort(dim=1).values)


def test_select_top_with_ties_returns_k_distinct_positions():
    pre = torch.tensor([0.0, 1.0]).repeat(20, 64)
    values, indices = select_top(pre, 8)
    assert (values == 1).all() and all(len(set(row.tolist())) == 8 for row in indices)
    assert torch.equal(pre.gather(1, indices), values)


def test_kernels_equal_the_dense_formulas_whatever_the_chunk(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(300, 12, generator=g), torch.randn(300, 20, generator=g)
    W_enc, W_dec, b = torch.randn(128, 12, generator=g), torch.randn(128, 20, generator=g), torch.randn(128, generator=g)
    monkeypatch.setattr("saehub_native.kernels.reference.CHUNK_BYTES", 4 * 128 * 70)  # 70 rows: the last chunk is short
    kernels = ReferenceKernels()
    values, indices = kernels.encode_select(x, W_enc, b, 6)
    pre = x.double() @ W_enc.double().T + b.double()
    assert torch.equal(indices.sort(1).values, pre.topk(6).indices.sort(1).values)
    assert torch.allclose(values.double(), pre.gather(1, indices).relu(), atol=1e-5)
    f = torch.zeros(300, 128, dtype=torch.float64).scatter(1, indices, values.double())
    assert torch.allclose(kernels.decode(values, indices, W_dec).double(), f @ W_dec.double(), atol=1e-4)
    dense = (grad.double() @ W_dec.double().T).gather(1, indices)
    assert torch.allclose(kernels.value_gradients(grad, indices, W_dec).double(), dense, atol=1e-4)
    firing = kernels.group(indices, 128)
    assert torch.equal(firing.counts_F, torch.bincount(indices.flatten(), minlength=128))
    assert torch.allclose(kernels.latent_sums(firing, values, grad).double(), f.T @ grad.double(), atol=1e-3)
