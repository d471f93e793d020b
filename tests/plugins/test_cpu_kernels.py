"""The compiled CPU kernels: the float32 selection whatever ranks it, exact clipping and updates, audit, resume, threads, the cache of machine code."""

from __future__ import annotations

import json
import math

import pytest
import torch

from saehub.api import Job
from saehub.errors import StageFailed
from saehub_native.config import AbsTopKConfig, BatchTopKConfig, GroupMaxConfig, MatryoshkaConfig, TopKConfig
from saehub_native.kernels import CHOICE, audit, compiled, cpu, pick
from saehub_native.kernels.cpu import CpuKernels
from saehub_native.kernels.lazy import Part, RowSums, joined
from saehub_native.kernels.reference import ReferenceKernels
from saehub_native.optim import Adam, clip
from saehub_native.train import NativeTrainer

pytestmark = pytest.mark.quick

KINDS = ["float32", "bfloat16", "int8"]
BATCH, D = 128, 24


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(rows: int, d: int, latents: int, seed: int = 0, outliers: bool = False):
    g = torch.Generator().manual_seed(seed)
    x, W, b = torch.randn(rows, d, generator=g), torch.randn(latents, d, generator=g) / d**0.5, 0.1 * torch.randn(latents, generator=g)
    if outliers:  # the massive activations of language models: two channels twenty times the others, one of them with a mean
        x[:, :2] = 20 * x[:, :2] + torch.tensor([60.0, 0.0])
    return x, W, b


def unsupported(x, W, b, values, indices, k: int, by_size: bool = False) -> int:
    """Selected latents below the k-th largest float64 value, and active latents left out above it, by more than 8u (|x||w| + |b|)."""
    exact = x.double() @ W.double().T + b.double()
    slack = 8 * 2.0**-24 * (x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + b.double().abs())
    exact = exact.abs() if by_size else exact
    bar = exact.sort(dim=1, descending=True).values[:, k - 1 : k].clamp_min(0)
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    for row in range(len(x)):
        chosen[row, indices[row][values[row] != 0]] = True
    return int((chosen & (exact < bar - slack)).sum() + (~chosen & (exact > bar + slack)).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "d", "latents", "k", "rule", "outliers"),
    [
        (70, 24, 151, 40, "top", False),  # no multiple of the group size; many of the top k are not positive
        (70, 24, 40, 40, "top", False),  # every latent is wanted
        (300, 96, 1024, 8, "top", False),
        (300, 96, 1024, 8, "top", True),
        (130, 33, 515, 1, "top", True),
        (150, 48, 512, 12, "abs", False),
        (60, 32, 96, 12, "group", False),
    ],
)
def test_selection_is_the_float32_one(kind, rows, d, latents, k, rule, outliers):
    x, W, b = problem(rows, d, latents, outliers=outliers)
    kernels = CpuKernels(kind)
    values, indices = kernels.encode_select(x, W, b, k, rule)
    exact = x.double() @ W.double().T + b.double()
    active = values != 0
    assert torch.allclose(values.double()[active], exact.gather(1, indices)[active], atol=1e-4 if outliers else 1e-5)
    assert all(len(set(row[on].tolist())) == int(on.sum()) for row, on in zip(indices, active, strict=True))
    if rule == "group":
        assert torch.equal(indices, exact.view(rows, k, -1).argmax(2) + torch.arange(k) * (latents // k))
    else:
        assert unsupported(x, W, b, values, indices, k, rule == "abs") == 0
    assert kernels.missed == 0 and kernels.cautions() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "outliers", "few positive", "uneven rows"])
def test_selection_over_a_batch_is_the_float32_one_whatever_was_guessed_before(kind, case):
    x, W, b = problem(130, 48, 640, outliers=case == "outliers")
    b = b - 4.0 if case == "few positive" else b
    if case == "uneven rows":
        x[:10] *= 8
    kernels = CpuKernels(kind)
    values, indices = kernels.encode_select_batch(x, W, b, 6)
    exact = x.double() @ W.double().T + b.double()
    found = torch.zeros_like(exact).scatter_add(1, indices, values.double())
    expected = torch.where((exact >= exact.flatten().topk(6 * 130).values[-1]) & (exact > 0), exact, 0)
    slack = 8 * 2.0**-24 * (x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + b.double().abs())
    cut = expected[expected > 0].min()
    sure = (exact - cut).abs() > slack
    assert torch.equal((found != 0)[sure], (expected != 0)[sure]) and torch.allclose(found[sure], expected[sure], atol=1e-4)
    assert case == "few positive" or int((values > 0).sum()) == 6 * 130
    assert kernels.missed == 0
    kernels.encode_select_batch(3 * x.flip(0), W, b + 1, 6)  # other guesses
    again = kernels.encode_select_batch(x, W, b, 6)
    assert torch.equal(again[0], values) and torch.equal(again[1], indices)


def test_rows_whose_scores_are_too_coarse_get_more_candidates():
    """Latents in near-equal pairs: their scores differ by less than int8 resolves, so k + r candidates would not do."""
    x, W, b = problem(64, 64, 1024)
    W = W[:8].repeat(128, 1) + 1e-3 * W
    kernels = CpuKernels("int8")
    values, indices = kernels.encode_select(x, W, b * 0, 4)
    assert unsupported(x, W, b * 0, values, indices, 4) == 0
    assert kernels.exact_a_row > 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_come_to_an_end_beside_others(kind, value):
    x, W, b = problem(8, 32, 4096)
    x[3, 5], x[5] = value, value
    values, indices = CpuKernels(kind).encode_select(x, W, b, 4)
    sound = [0, 1, 2, 4, 6, 7]
    assert unsupported(x[sound], W, b, values[sound], indices[sound], 4) == 0
    assert not values[3].isfinite().all()


def test_a_miss_is_found_doubles_r_then_changes_the_product_and_is_said(monkeypatch):
    monkeypatch.setattr(cpu, "AUDIT_EVERY", 1)
    monkeypatch.setattr(cpu, "GUARD", -math.inf)  # no second look
    x, W, b = problem(32, 64, 2048, outliers=True)
    kernels = CpuKernels("int8")
    kernels.ranker.prepare(x, W)
    kernels.ranker.low8_FD.random_(-127, 127)  # scores that rank nothing
    kernels.ranker.kept(W)
    for _ in range(5):
        kernels.encode_select(x, W, b, 4)
    assert (kernels.r, kernels.ranker.kind, kernels.audited) == (16, "bfloat16", 5 * cpu.AUDIT_ROWS)
    values, indices = kernels.encode_select(x, W, b, 4)  # a product that works: nothing more is missed
    assert unsupported(x, W, b, values, indices, 4) == 0
    (caution,) = kernels.cautions()
    assert f"{kernels.missed} of {kernels.audited} rows" in caution and "bfloat16" in caution
    resumed = CpuKernels("float32")
    resumed.load_state(json.loads(json.dumps(kernels.state())))
    assert resumed.state() == kernels.state()


def test_the_audit_uses_the_stated_criterion():
    x, W, b = problem(20, 16, 64)
    values, indices = ReferenceKernels().encode_select(x, W, b, 5)
    assert not audit.missed_rows(x, W, b, values, indices, 5).any()
    weakest = values[3].argmin()
    left_out = ((x[3] @ W.T + b).argsort(descending=True))[5]
    indices[3, weakest] = left_out
    assert audit.missed_rows(x, W, b, values, indices, 5).nonzero().flatten().tolist() == [3]
    values[7, values[7].argmax()] = 0  # an active latent that is not there
    assert audit.missed_rows(x, W, b, values, indices, 5).nonzero().flatten().tolist() == [3, 7]


def pairs(latents: int, d: int, seed: int):
    """A gradient as sums over pairs with two dense rows, and the same as a float64 tensor."""
    g = torch.Generator().manual_seed(seed)
    indices, weights = torch.randint(0, latents, (50, 6), generator=g), torch.randn(50, 6, generator=g)
    weights[weights.abs() < 0.3] = 0
    source = torch.randn(50, d, generator=g)
    kernels = CpuKernels()
    sums = RowSums(kernels, [Part(kernels.group(indices, latents, weights), weights.reshape(-1), source, latents)])
    rows, extra = torch.tensor([3, latents - 1]), torch.randn(2, d, generator=g)
    sums.index_add_(0, rows, extra)
    spread = torch.zeros(50, latents, dtype=torch.float64).scatter_add_(1, indices, weights.double())
    return sums, (spread.T @ source.double()).index_add_(0, rows, extra.double())


@pytest.mark.parametrize("largest", [1e-2, 1e9, 120.0])  # clipped; not clipped by the bound; clipped or not only the norm can tell
def test_clipping_projection_adam_and_norm_equal_the_dense_steps_in_float64(largest):
    g = torch.Generator().manual_seed(5)
    W_enc, W_dec, b = torch.randn(200, 12, generator=g), torch.nn.functional.normalize(torch.randn(200, 20, generator=g), dim=1), torch.zeros(7)
    ours = {"W_enc": W_enc.clone(), "W_dec": W_dec.clone(), "b": b.clone()}
    exact = {name: p.double() for name, p in ours.items()}
    adam, dense_adam = Adam(ours, (0.8, 0.95)), Adam(exact, (0.8, 0.95))
    for step in range(3):
        (g_enc, enc), (g_dec, dec), small = pairs(200, 12, step), pairs(200, 20, 9 + step), torch.randn(7, generator=g)
        g_dec.sphere = True
        dec = dec - (dec * exact["W_dec"]).sum(1, keepdim=True) * exact["W_dec"]
        square = g_enc.kernels.square(g_dec, ours["W_dec"])
        assert square == pytest.approx(float(dec.square().sum()), rel=1e-5) and square <= g_enc.kernels.square_bound(g_dec)
        grads, dense = {"W_enc": g_enc, "W_dec": g_dec, "b": small.clone()}, {"W_enc": enc, "W_dec": dec, "b": small.double()}
        norm = math.sqrt(sum(float(t.square().sum()) for t in dense.values()))
        dense = {name: t * min(1.0, largest / norm) for name, t in dense.items()}
        clip(ours, grads, largest)
        assert torch.allclose(g_dec.dense(ours["W_dec"]).double(), dense["W_dec"], rtol=1e-4, atol=1e-5 * min(1.0, largest / norm))
        adam.step(grads, 1e-3)
        dense_adam.step(dense, 1e-3)
        exact["W_dec"] /= exact["W_dec"].norm(dim=1, keepdim=True)
    for name in ours:
        assert float((ours[name].double() - exact[name]).abs().max()) < 2e-5, name
    assert torch.allclose(ours["W_dec"].norm(dim=1), torch.ones(200), atol=1e-6)


def test_a_step_takes_its_share_of_a_gradient_from_float64():
    """1 − 0.999 in float32 is 1.3e-5 too small, and a run would drift away from the plain path by that much of every step."""
    sums, _ = pairs(200, 12, 0)
    g, params = sums.dense().double(), {"W": torch.zeros(200, 12)}
    adam = Adam(params, (0.9, 0.999))
    adam.step({"W": sums}, 1e-3)
    there = g.abs() > 1e-3
    assert float((adam.m["W"].double() / (0.1 * g) - 1)[there].abs().max()) < 1e-6
    assert float((adam.v["W"].double() / (0.001 * g.square()) - 1)[there].abs().max()) < 2e-6


def test_blocks_of_latents_are_joined_and_copies_of_weights_follow_every_kind_of_change():
    (first, a), (second, b) = pairs(40, 12, 1), pairs(30, 12, 2)
    first.extra = second.extra = None
    rows = torch.tensor([3, 39]), torch.tensor([3, 29])
    for dense, sums, own in ((a, first, rows[0]), (b, second, rows[1])):
        dense[own] = 0
        dense[own] += sums.dense()[own].double()
    both = joined([first, second])
    assert both.shape == (70, 12) and torch.allclose(both.dense().double(), torch.cat([a, b]), atol=1e-4)

    x, W, bias = problem(40, 12, 70)
    for kind in ("int8", "bfloat16"):
        kernels, params = CpuKernels(kind), {"W_enc": W.clone()}
        both.kernels = kernels
        adam = Adam(params)
        kernels.encode_select(x, params["W_enc"], bias, 3)
        adam.step({"W_enc": both}, 0.5)  # the update writes the copies
        kept = [t.clone() for t in (kernels.ranker.low8_FD, kernels.ranker.low16_FD, kernels.ranker.low_scale_F)]
        assert kernels.ranker.fresh(params["W_enc"])
        values, indices = kernels.encode_select(x, params["W_enc"], bias, 3)
        assert unsupported(x, params["W_enc"], bias, values, indices, 3) == 0
        params["W_enc"] *= 1.0  # torch writes: made anew, and the same
        assert not kernels.ranker.fresh(params["W_enc"])
        kernels.encode_select(x, params["W_enc"], bias, 3)
        made = (kernels.ranker.low8_FD, kernels.ranker.low16_FD, kernels.ranker.low_scale_F)
        assert all(torch.equal(one, two) for one, two in zip(kept, made, strict=True))
        if kind == "bfloat16":
            assert torch.equal(kernels.ranker.low16_FD.view(torch.bfloat16), params["W_enc"].bfloat16())


# Training


def make_rows(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(60, D, generator=g), dim=1)
    codes = torch.rand(n, 60, generator=g) * (torch.rand(n, 60, generator=g) < 0.06)
    return 3 * codes @ directions + 0.05 * torch.randn(n, D, generator=g) + 0.3


def open_session(config=None, steps: int = 40):
    config = config or TopKConfig(k=6, width=144, batch=BATCH, calibration=256, dead_after=2 * BATCH, k_aux=8)
    job = Job("job", "resid_post.1", None, D, D, steps, BATCH, steps * BATCH, seed=0)
    return NativeTrainer(config).open(job, lambda n: (make_rows(n, seed=99), None))


def feed(session, rows, first: int, last: int):
    for step in range(first, last):
        session.step(rows[step * BATCH : (step + 1) * BATCH])
    return session


def as_bytes(session) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in session.state()[0].items()}


SPARSE = [TopKConfig, BatchTopKConfig, MatryoshkaConfig, AbsTopKConfig, GroupMaxConfig]


@pytest.mark.parametrize(
    ("make", "kind", "k"),
    [*((TopKConfig, kind, 6) for kind in KINDS), (TopKConfig, "int8", 3), *((make, "int8", 6) for make in SPARSE[1:])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_resumed_run_takes_the_same_path_and_ends_bit_identical(monkeypatch, make, kind, k):
    monkeypatch.setattr(cpu, "AUDIT_EVERY", 4)
    config = make(k=k, width=144, batch=BATCH, calibration=256, dead_after=BATCH, k_aux=4)
    rows = make_rows(16 * BATCH)
    monkeypatch.setenv(CHOICE, f"cpu:{kind}")
    straight, first = feed(open_session(config), rows, 0, 16), feed(open_session(config), rows, 0, 7)
    assert straight.kernels.audited > 0 and straight.kernels.ranker.kind == kind
    tensors, data = first.state()
    assert "companion" in data["kernel_state"], "AuxK was not at work: the test would prove too little"
    monkeypatch.setenv(CHOICE, "reference")  # what a new training would take does not matter
    second = open_session(config)
    second.load_state(tensors, json.loads(json.dumps(data)))
    feed(second, rows, 7, 16)
    assert as_bytes(second) == as_bytes(straight)
    assert second.state()[1] == straight.state()[1]


def test_which_thread_does_what_does_not_matter():
    x, W, b = problem(700, 48, 512)
    target = torch.randn(700, 48, generator=torch.Generator().manual_seed(3))
    found = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        kernels = CpuKernels("int8")
        values, indices = kernels.encode_select(x, W, b, 8)
        residual, grad, delta, error = kernels.reconstruct(target.clone(), values, indices, W, 0.1)
        firing = kernels.group(indices, 512, values)
        sums = RowSums(kernels, [Part(firing, delta.reshape(-1), x, 512)])
        params = {"W_enc": W.clone()}
        square = kernels.square(sums, W)
        Adam(params).step({"W_enc": sums}, 1e-3)
        found.append((values, indices, residual, grad, delta, error, torch.tensor(square), params["W_enc"]))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    rows = make_rows(8 * BATCH)
    assert as_bytes(feed(open_session(), rows, 0, 8)) == as_bytes(feed(open_session(), rows, 0, 8))


def test_an_error_in_any_thread_is_raised():
    torch.set_num_threads(3)
    done = []

    def piece(number: int) -> None:
        if number == 5:
            raise ValueError("piece 5")
        done.append(number)

    with pytest.raises(ValueError, match="piece 5"):
        CpuKernels("float32").team.run(piece, 12)
    CpuKernels("float32").team.run(done.append, 4)


@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(k=6, width=144, batch=BATCH),
        BatchTopKConfig(k=6, width=144, batch=BATCH),
        MatryoshkaConfig(k=6, width=144, batch=BATCH),
        GroupMaxConfig(k=6, width=144, batch=BATCH),
    ],
    ids=lambda config: config.architecture(),
)
def test_training_follows_the_plain_path(monkeypatch, config):
    """Later the two drift apart as any two roundings do; tests/benchmarks/train_fvu.py compares the FVU at the end."""
    rows = make_rows(60 * BATCH)
    losses = {}
    for kernels in ("reference", "cpu"):
        monkeypatch.setenv(CHOICE, kernels)
        session = open_session(config, 400)
        losses[kernels] = [feed(session, rows, step, step + 1).metrics()["loss"] for step in range(60)]
        assert (session.kernels.name, session.kernels.lazy) == (kernels, True)
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=2e-3)


def test_choosing_kernels(monkeypatch):
    monkeypatch.delenv(CHOICE, raising=False)
    assert pick("cpu").name == "cpu" and pick("cpu", "reference").name == "reference" and pick("cuda:0").name == "reference"
    assert pick("cpu", "cpu").ranker.kind in KINDS
    with pytest.raises(StageFailed, match="'cpu', which are not there") as failure:
        pick("cuda:0", "cpu")
    assert "reference" in failure.value.why
    monkeypatch.setenv(CHOICE, "cpu:int4")
    with pytest.raises(StageFailed, match="SAEHUB_KERNELS asks for the kernels 'cpu:int4'"):
        pick("cpu")


def test_machine_code_is_cached_where_it_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert compiled.cache_folder(compiled.__file__).parent == tmp_path / "mine"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled.cache_folder(compiled.__file__).is_relative_to(tmp_path / "cache" / "saehub")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made here
    assert compiled.cache_folder(compiled.__file__) is None
    double = compiled.compiler(compiled.__file__)(lambda x: 2 * x)
    assert double(21) == 42
