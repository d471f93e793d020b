"""AuxK by the compiled CPU loops: loss and gradients over several blocks of rows and tiles of latents, against float64 autograd of the dense formula."""

from __future__ import annotations

import pytest
import torch

from saehub_native.architectures.auxk import add_auxk
from saehub_native.kernels import cpu_wide
from saehub_native.kernels.cpu import WIDE, CpuKernels

pytestmark = pytest.mark.quick

ROWS, D_IN, D_OUT, LATENTS = 600, 200, 260, 1600
NAMES, K_AUX = ("W_enc", "b_enc", "W_dec"), (90, 20)


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def problem(seed: int = 0):
    """Parameters, rows, a residual with a mean, and which latents are dead. The rows' supports have a margin: float32 chooses what float64 does.
    A few rows are zero: their pre-activations are the biases."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(LATENTS, D_OUT, generator=g), dim=1)
    params = {"W_enc": torch.randn(LATENTS, D_IN, generator=g) / D_IN**0.5, "b_enc": 0.3 * torch.randn(LATENTS, generator=g), "W_dec": W_dec}
    x, residual = torch.randn(3 * ROWS, D_IN, generator=g), torch.randn(ROWS, D_OUT, generator=g) + 0.5
    x[::97] = 0
    dead = torch.rand(LATENTS, generator=g) < 0.9
    pre = x.double() @ params["W_enc"][dead].double().T + params["b_enc"][dead].double()
    margins = [best[:, k - 1] - best[:, k] for best in (pre.sort(1, True).values, pre.abs().sort(1, True).values) for k in K_AUX]
    return params, x[torch.stack(margins).amin(0) > 1e-5][:ROWS], residual, dead


def expected(params, x, residual, dead, k_aux: int, alpha: float, signed: bool):
    """α L_aux and its gradients by autograd in float64, from the k_aux chosen among float64 pre-activations."""
    wide = {name: params[name].double().requires_grad_() for name in NAMES}
    pre = x.double() @ wide["W_enc"][dead].T + wide["b_enc"][dead]
    keep = torch.zeros_like(pre).scatter_(1, (pre.abs() if signed else pre).topk(k_aux, dim=1).indices, 1.0)
    acts = pre * keep if signed else (pre * keep).relu()
    e = residual.double()
    loss = alpha * (acts @ wide["W_dec"][dead] - e).square().sum() / (e - e.mean(0)).square().sum()
    return float(loss.detach()), dict(zip(NAMES, torch.autograd.grad(loss, list(wide.values())), strict=True))


def measured(kernels, params, x, residual, dead, k_aux: int, alpha: float, signed: bool, told: bool):
    """What the kernels add to gradients of 0; `told`: AuxK selects from the scores of a selection over all latents."""
    if told:
        kernels.expect_auxk(params, x, dead, k_aux, signed)
        kernels.encode_select(x, params["W_enc"], params["b_enc"], 5, "abs" if signed else "top")
    grads = {name: torch.zeros_like(params[name]) for name in NAMES}
    before = residual.clone()
    loss = add_auxk(grads, params, x, residual, dead, k_aux=k_aux, alpha=alpha, signed=signed, kernels=kernels)
    assert torch.equal(residual, before)
    return float(loss), grads


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("k_aux", K_AUX, ids=["many pairs", "few pairs"])
@pytest.mark.parametrize("signed", [False, True], ids=["top", "abs"])
def test_loss_and_gradients_are_those_of_the_dense_formula(kind, k_aux, signed):
    problem_ = problem()
    dead = problem_[3]
    assert len(problem_[1]) == ROWS > 2 * cpu_wide.BLOCK and int(dead.sum()) > 2 * cpu_wide.tile_of(D_OUT) and (WIDE * k_aux > int(dead.sum())) == (k_aux == 90)
    wanted_loss, wanted = expected(*problem_, k_aux, 0.5, signed)
    kernels, results = CpuKernels(kind), []
    for told in (True, False, True):
        loss, grads = measured(kernels, *problem_, k_aux, 0.5, signed, told)
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        for name in NAMES:
            assert relative(grads[name], wanted[name]) < 1e-5, (name, told)
        results.append(grads)
    for grads in results[1:]:  # where the scores come from, and how many candidates there were, changes nothing
        assert all(torch.equal(grads[name], results[0][name]) for name in NAMES)
    assert kernels.companion().audited > 0 and kernels.companion().missed == 0


def test_a_residual_that_is_all_but_constant_is_normalised_by_what_varies():
    params, x, residual, dead = problem()
    residual = 1e-2 * residual + 3.0
    wanted_loss, wanted = expected(params, x, residual, dead, 90, 0.5, False)
    loss, grads = measured(CpuKernels(), params, x, residual, dead, 90, 0.5, False, told=True)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)  # float32 rows of 3 ± 0.01 carry 1e-7 · 300 of their deviation
    assert all(relative(grads[name], wanted[name]) < 1e-5 for name in NAMES)


def test_the_hint_is_for_the_rows_it_was_given_for():
    params, x, residual, dead = problem()
    kernels = CpuKernels()
    kernels.expect_auxk(params, x, dead, 90)
    kernels.encode_select(x, params["W_enc"], params["b_enc"], 5)
    others = problem(seed=1)[1]
    wanted = expected(params, others, residual, dead, 90, 0.5, False)[1]
    grads = measured(kernels, params, others, residual, dead, 90, 0.5, False, told=False)[1]
    assert all(relative(grads[name], wanted[name]) < 1e-5 for name in NAMES)
