"""ReLU, JumpReLU and Gated against float64 dense autograd (JumpReLU through its stated straight-through formula), in each of the three kinds."""

from __future__ import annotations

import pytest
import torch

from saehub.api import Job
from saehub_native.architectures.gated import Gated
from saehub_native.architectures.jumprelu import JumpReLU
from saehub_native.architectures.relu import SMOOTH, ReLU
from saehub_native.config_dense import GatedConfig, JumpReLUConfig, ReLUConfig
from saehub_native.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.quick

F, MARGIN = 90, 1e-3
KINDS = {"autoencoder": (20, 20, False), "transcoder": (20, 14, False), "skip_transcoder": (14, 20, True)}
CASES = {
    "relu": (ReLU, ReLUConfig, {"sparsity": 0.3, "p_anneal": 0.0}),
    "relu_p": (ReLU, ReLUConfig, {"sparsity": 0.3, "p_anneal": 0.5, "p_end": 0.4}),
    "jumprelu_l0": (JumpReLU, JumpReLUConfig, {"penalty": "l0", "sparsity": 0.7, "target_l0": 5.0, "bandwidth": 0.2}),
    "jumprelu_l0_plain": (JumpReLU, JumpReLUConfig, {"penalty": "l0", "sparsity": 0.02, "bandwidth": 0.2}),
    "jumprelu_tanh": (JumpReLU, JumpReLUConfig, {"penalty": "tanh", "sparsity": 0.3, "bandwidth": 0.2, "preact": 0.05}),
    "gated": (Gated, GatedConfig, {"sparsity": 0.3}),
}


def build(name: str, kind: str, **settings):
    """An architecture, moved parameters, rows and targets; float32."""
    d_in, d_out, skip = KINDS[kind]
    g = torch.Generator().manual_seed(1)
    job = Job("j", "resid_post.1", None if kind == "autoencoder" else "mlp_out.1", d_in, d_out, steps=10, batch=64, rows=640, seed=0)
    cls, make, own = CASES[name]
    config = make(**{"width": F, "batch": 64, "revive": 0.01, "skip": skip} | own | settings)
    assert list(config.check(job)) == []
    architecture = cls(config, job, ReferenceKernels())
    x = torch.randn(500, d_in, generator=g) + 0.5
    y = x if kind == "autoencoder" else torch.randn(500, d_out, generator=g) - 0.3
    params = architecture.init(x[:200], y[:200], g)
    for parameter in params.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return architecture, params, x, y, g


class Jump(torch.autograd.Function):
    """z·[z > θ] (or [z > θ] if `step`), with the pseudo-derivatives of the paper written out for every element; on z too if `through`."""

    @staticmethod
    def forward(ctx, z, theta, width, step, through):
        ctx.save_for_backward(z, theta)
        ctx.width, ctx.step, ctx.through = width, step, through
        on = (z > theta).to(z)
        return on if step else z * on

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        inside = ((z - theta) / ctx.width).abs() < 0.5
        towards = (1.0 if ctx.step else theta) / ctx.width * inside
        return (None if ctx.step else grad * ((z > theta) + towards * ctx.through)), -(grad * towards).sum(0), None, None, None


def dense_loss(name: str, config, p, x, y, dead_F, subtract: bool, variance: float):
    """The stated loss over dense float64 tensors; f and the residual beside it."""
    scale, n = variance**0.5, len(x)
    centred = x - p["b_dec"] if subtract else x
    linear = x @ p["W_skip"].T if "W_skip" in p else 0
    bias = "b_gate" if name == "gated" else "b_enc"
    if name == "gated":
        q = centred @ p["W_enc"].T
        pi = q + p["b_gate"]
        f = (pi > 0) * torch.relu(q * p["r_mag"].exp() + p["b_mag"])
        frozen = (y - torch.relu(pi) @ p["W_dec"].detach() - p["b_dec"].detach() - (linear.detach() if "W_skip" in p else 0)).pow(2).sum()
        extra = config.sparsity / n * torch.relu(pi).sum() / scale + frozen / (n * variance)
    elif name.startswith("relu"):
        f = torch.relu(centred @ p["W_enc"].T + p["b_enc"])
        u = f * p["W_dec"].norm(dim=1) / scale
        exponent = 0.4 if name == "relu_p" else 1.0
        extra = config.sparsity / n * ((u + SMOOTH).pow(exponent) - SMOOTH**exponent).sum()
    else:
        z, theta, width = centred @ p["W_enc"].T + p["b_enc"], p["log_threshold"].exp(), config.bandwidth * scale
        f = Jump.apply(z, theta, width, False, config.penalty == "tanh")
        if config.penalty == "l0":
            l0 = Jump.apply(z, theta, width, True, False).sum() / n
            extra = config.sparsity * ((l0 / config.target_l0 - 1).square() if config.target_l0 else l0)
        else:
            extra = config.sparsity / n * torch.tanh(config.tanh_scale * f / scale).sum()
            extra = extra + config.preact / n * torch.relu(theta - z).sum() / scale
    residual = y - f @ p["W_dec"] - p["b_dec"] - linear
    loss = residual.pow(2).sum() / (n * variance) + extra - 0.01 * p[bias][dead_F].sum()
    return loss, f, residual


def clear_rows(name: str, config, p, x, subtract: bool, variance: float):
    """Rows in which nothing is within MARGIN of a kink (an activation's, the rectangle's)."""
    pre = (x - p["b_dec"] if subtract else x) @ p["W_enc"].T
    if name == "gated":
        kinks = [pre + p["b_gate"], pre * p["r_mag"].exp() + p["b_mag"]]
    elif name.startswith("relu"):
        kinks = [pre + p["b_enc"]]
    else:
        z, theta, width = pre + p["b_enc"], p["log_threshold"].exp(), config.bandwidth * variance**0.5
        kinks = [z - theta, z - theta - width / 2, z - theta + width / 2]
    return torch.stack([(kink.abs() > MARGIN).all(1) for kink in kinks]).all(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_equals_float64_dense_autograd(name, kind, monkeypatch):
    architecture, params, x, y, g = build(name, kind)
    monkeypatch.setattr("saehub_native.architectures.dense.CHUNK_BYTES", 4 * F * 70)  # chunks of 70 rows: several, and a short one
    config, variance, subtract = architecture.config, architecture.constants["variance"], kind == "autoencoder"
    if name.startswith("jumprelu"):
        # Thresholds amid the pre-activations, so that many fall inside the rectangle.
        params["log_threshold"] = (0.3 + 0.2 * torch.rand(F, generator=g)).log()
    dead_F = torch.zeros(F, dtype=torch.bool)
    dead_F[torch.randperm(F, generator=g)[:20]] = True
    exact = {n: p.double().requires_grad_() for n, p in params.items()}
    ok = clear_rows(name, config, {n: p.detach() for n, p in exact.items()}, x.double(), subtract, variance)
    x, y = x[ok], y[ok]
    assert len(x) >= 150
    before = [t.clone() for t in (x, y, *params.values())]
    result = architecture.gradients(params, x, y, dead_F)
    loss, f, residual = dense_loss(name, config, exact, x.double(), y.double(), dead_F, subtract, variance)
    loss.backward()
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(result.residual_BD.double(), residual.detach(), atol=1e-5)
    assert float(result.l0) == pytest.approx(float((f > 0).sum(1).double().mean()), abs=1e-4)
    assert torch.equal(result.fired_F, (f > 0).any(0)) and set(result.grads) == set(params)
    for n, p in exact.items():
        error = float((result.grads[n].double() - p.grad).norm() / p.grad.norm())
        assert error <= 1e-5, f"{n}: {error:.1e}"
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, *params.values()), strict=True))


def test_p_falls_at_the_end_and_the_penalty_keeps_its_size():
    architecture, params, x, y, _ = build("relu_p", "autoencoder")
    assert [architecture.p(step) for step in (0, 4, 6, 9)] == pytest.approx([1, 1, 0.76, 0.4]) and architecture.p(None) == 0.4
    nobody = torch.zeros(F, dtype=torch.bool)
    plain = build("relu", "autoencoder")[0]
    plain.constants = dict(architecture.constants)
    flat = plain.gradients(params, x, y, nobody)
    architecture.gradients(params, x, y, nobody, step=9)  # this batch sets the ratio of the next one
    shaped = architecture.gradients(params, x, y, nobody, step=9)
    assert float(shaped.loss) == pytest.approx(float(flat.loss), rel=1e-4)


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu_tanh"])
def test_lambda_rises_and_is_steered_to_the_target(name):
    architecture, params, x, y, _ = build(name, "autoencoder", target_l0=3.0, sparsity_warmup=0.2)
    assert architecture.coefficient(0) == pytest.approx(0.15) and architecture.coefficient(1) == pytest.approx(0.3)
    result = architecture.gradients(params, x, y, torch.zeros(F, dtype=torch.bool), step=5)
    assert float(result.l0) > 3 and architecture.coefficient(6) > architecture.coefficient(None) * 0.99 > 0.3
    weaker = build(name, "autoencoder", target_l0=80.0)[0]
    weaker.constants["variance"] = architecture.constants["variance"]
    weaker.gradients(params, x, y, torch.zeros(F, dtype=torch.bool), step=5)
    assert weaker.coefficient(6) < 0.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu_tanh", "jumprelu_l0"])
@pytest.mark.parametrize("target", [6.3, 70.0])
def test_at_the_end_the_target_is_met_on_the_calibration_rows(name, kind, target):
    architecture, params, x, *_ = build(name, kind, target_l0=target)
    tensors = architecture.export(params, x)[1]
    pre = architecture.centred(params, x).double() @ params["W_enc"].T.double()
    bias = "b_gate" if name == "gated" else "b_enc"
    fires = pre + tensors[bias] > tensors.get("threshold", 0.0)
    wanted = round(target * len(x))
    if name.startswith("jumprelu"):
        moved = tensors["threshold"] / params["log_threshold"].exp()
        wanted = min(wanted, int((pre + params["b_enc"] > 0).sum()))  # a threshold lies above 0
    else:
        moved = tensors[bias] - params[bias]
        same = {key: value for key, value in architecture.export(params)[1].items() if key != bias}
        assert all(torch.equal(tensors[key], value) for key, value in same.items())
    assert abs(int(fires.sum()) - wanted) <= 2  # the last one is at its threshold
    assert float(moved.std()) <= 1e-5 and float((moved - (1 if "threshold" in tensors else 0)).abs().min()) > 1e-3


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu_tanh", "jumprelu_l0_plain"])
def test_nothing_is_moved_without_a_target_or_where_nothing_can_fire(name):
    architecture, params, x, *_ = build(name, "autoencoder", target_l0=None)
    given = architecture.export(params)[1]
    bias = "b_gate" if name == "gated" else "b_enc"
    assert all(torch.equal(value, given[key]) for key, value in architecture.export(params, x)[1].items())
    silent = params | {bias: params[bias] - 1e4}
    steered = build(name, "autoencoder", target_l0=4.0)[0]
    expected = architecture.export(silent)[1]
    assert all(torch.equal(value, expected[key]) for key, value in steered.export(silent, x)[1].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu_tanh"])
def test_at_the_start_a_multiple_of_the_target_fires_and_the_scale_is_the_best_one(name, kind):
    d_in, d_out, skip = KINDS[kind]
    g = torch.Generator().manual_seed(4)
    x, y = 3 * torch.randn(400, d_in, generator=g) + 1, torch.randn(400, d_out, generator=g)
    y = x if kind == "autoencoder" else y + x[:, :1]
    job = Job("j", "resid_post.1", None if kind == "autoencoder" else "mlp_out.1", d_in, d_out, steps=10, batch=64, rows=640, seed=0)
    cls, make, own = CASES[name]
    architecture = cls(make(**own | {"width": F, "batch": 64, "skip": skip, "target_l0": 3.0}), job, ReferenceKernels())
    p = {key: value.double() for key, value in architecture.init(x, y, g).items()}
    centred = x.double() - (p["b_dec"] if kind == "autoencoder" else 0)
    if name.startswith("jumprelu"):
        z = centred @ p["W_enc"].T + p["b_enc"]
        fired = z > p["log_threshold"].exp() * (1 - 1e-6)
        assert float(fired.sum(1).double().mean()) == pytest.approx(3, abs=0.01)
        return
    f = torch.relu(centred @ p["W_enc"].T + p["b_gate" if name == "gated" else "b_enc"])
    assert float((f > 1e-6).sum(1).double().mean()) == pytest.approx(12, abs=0.01)  # 4 times; the last one is at 0
    guess = f @ p["W_dec"]
    best = ((y - p["b_dec"]) * guess).sum() / guess.square().sum()
    assert float(best) == pytest.approx(1, abs=1e-3)
    if name == "gated":
        assert torch.equal(p["b_gate"], p["b_mag"])


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (ReLUConfig, {}, "target_l0 is missing"),
        (ReLUConfig, dict(target_l0=0.0), "target_l0 is 0"),
        (GatedConfig, dict(target_l0=1000.0), "target_l0 is 1000"),
        (GatedConfig, dict(sparsity=-1.0), "sparsity is -1"),
        (ReLUConfig, dict(sparsity=1.0, sparsity_warmup=2.0), "sparsity_warmup is 2"),
        (ReLUConfig, dict(sparsity=1.0, p_anneal=-1.0), "p_anneal is -1"),
        (ReLUConfig, dict(sparsity=1.0, p_anneal=0.5, p_end=0.0), "p_end is 0"),
        (JumpReLUConfig, dict(sparsity=1.0, bandwidth=0.0), "bandwidth is 0"),
        (JumpReLUConfig, dict(sparsity=1.0, preact=-1.0), "preact is -1"),
        (JumpReLUConfig, dict(sparsity=1.0, tanh_scale=0.0), "tanh_scale is 0"),
    ],
)
def test_settings_that_cannot_work_are_named(make, settings, words):
    job = Job("j", "resid_post.1", None, 20, 20, steps=10, batch=1024, rows=10240, seed=0)
    problems = list(make(**{"width": F} | settings).check(job))
    assert len(problems) == 1 and words in problems[0], problems
