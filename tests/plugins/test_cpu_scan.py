"""Int8 rows and weights in; exact products, and selections that do not depend on whether all scores were written down, out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saehub_native.kernels import scanning
from saehub_native.kernels.cpu import CpuKernels

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    held = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(held)


def problem(rows: int, d: int, latents: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x, W, b = torch.randn(rows, d, generator=g), torch.randn(latents, d, generator=g) / d**0.5, 0.1 * torch.randn(latents, generator=g)
    x[3], x[7] = 0, x[6]  # all scores are biases; a row twice
    W[latents // 2 : latents // 2 + 40] = W[5]  # ties
    return x, W, b


def kernels(scans: bool) -> CpuKernels:
    made = CpuKernels("int8")
    assert made.ranker.scanner is not None
    made.ranker.scanner.there = scans and made.ranker.scanner.there
    return made


@pytest.mark.parametrize("rule", ["top", "abs"])
@pytest.mark.parametrize(("rows", "d", "latents", "k"), [(130, 48, 4096, 4), (67, 30, 5003, 9), (600, 17, 4100, 3)])
def test_a_scan_selects_what_all_scores_select(rule, rows, d, latents, k):
    x, W, b = problem(rows, d, latents)
    b = b - 0.3
    scans, writes = kernels(True), kernels(False)
    assert scans.ranker.scanner.suits(latents, k + scans.r) == scans.ranker.scanner.there
    for sign in (1, -1):  # of other weights the tiles are made anew
        W *= sign
        found, expected = scans.encode_select(x, W, b, k, rule), writes.encode_select(x, W, b, k, rule)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        dense = x.double() @ W.double().T + b.double()
        best = (dense.abs() if rule == "abs" else dense.relu()).topk(k, 1).values
        assert torch.allclose(found[0].double().abs().sort(1, descending=True).values, best, atol=1e-5)


@pytest.mark.parametrize("best", ["far too few", "far too many"])
def test_a_bound_that_lets_too_few_or_too_many_through_costs_time_only(monkeypatch, best):
    x, W, b = problem(50, 32, 4096)
    expected = kernels(False).encode_select(x, W, b, 5)
    scans = kernels(True)
    places = scans.ranker.scanner.places
    if best == "far too few":
        monkeypatch.setattr("saehub_native.kernels.cpu.rank", lambda need, sample, n: 1)
    else:
        monkeypatch.setattr("saehub_native.kernels.cpu.rank", lambda need, sample, n: sample)
    monkeypatch.setattr(scanning.Scanner, "places", lambda self, n, need: min(places(n, need), 512))
    found = scans.encode_select(x, W, b, 5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_seen_and_disturb_no_other(value):
    x, W, b = problem(20, 32, 4096)
    expected = kernels(False).encode_select(x, W, b, 4)
    x[5, 2], x[11] = value, value
    found = kernels(True).encode_select(x, W, b, 4)
    sound = [i for i in range(20) if i not in (5, 11)]
    assert torch.equal(found[0][sound], expected[0][sound]) and torch.equal(found[1][sound], expected[1][sound])
    assert not found[0][[5, 11]].isfinite().all()


def test_a_selection_over_a_batch_is_the_same_from_a_scan():
    x, W, b = problem(130, 40, 4100)
    for k in (3, 8):
        scans, writes = kernels(True), kernels(False)
        for rows in (x, 3 * x.flip(0), x):  # other guesses at where to begin
            found, expected = scans.encode_select_batch(rows, W, b, k), writes.encode_select_batch(rows, W, b, k)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_where_fewer_are_positive_than_wanted_all_positive_values_are_selected():
    x, W, b = problem(64, 40, 4100)
    b = torch.full_like(b, -30.0)
    b[::700] = torch.linspace(20, 40, len(b[::700]))
    exact = (x.double() @ W.double().T + b.double()).relu()
    exact[exact < 1e-4] = 0
    for scans in (True, False):
        values, indices = kernels(scans).encode_select_batch(x, W, b, 8)
        found = torch.zeros_like(exact).scatter_add(1, indices, values.double())
        assert 0 < int((exact > 0).sum()) < 8 * 64
        assert torch.allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("positive", [False, True])
def test_the_kth_largest_of_rows_of_unequal_length_is_torchs(positive):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(700, 50, generator=g)
    values[::3] = (4 * values[::3]).round() / 4  # ties
    values[:, 40:] *= 1e-30
    counts = torch.randint(0, 51, (700,), generator=g, dtype=torch.int32)
    kept = values[torch.arange(50) < counts[:, None]]
    kept = kept[kept > 0] if positive else kept
    for k in (1, 2, 333, kept.numel() - 1, kept.numel(), kept.numel() + 5):
        wanted = float(torch.kthvalue(kept, max(1, kept.numel() - k + 1)).values)
        assert CpuKernels("float32")._kth_largest(values.numpy(), counts.numpy(), k, positive) == (wanted, kept.numel())
    assert CpuKernels("float32")._kth_largest(-values.abs().numpy(), counts.numpy() * 0, 3, positive) == (0.0, 0)


def test_products_are_exact():
    from saehub_native.kernels import cpu_scan

    if not cpu_scan.THERE:
        assert not kernels(True).ranker.scanner.suits(1 << 16, 40)  # nor is it asked for
        return
    rng = np.random.default_rng(0)
    for rows, d, latents in ((7, 64, 128), (13, 30, 200), (6, 5, 3)):
        low_x, low_W = (torch.from_numpy(rng.integers(-127, 128, (n, d), dtype=np.int8)) for n in (rows, latents))
        kept = kernels(True).ranker
        kept.low8_FD, kept.changes = low_W, 1
        scanner = kept.scanner
        tiles, x8 = scanner.tiles(kept), scanner.rows(low_x)
        begin = np.empty(rows, np.int32)
        cpu_scan._beginnings(0, rows, x8, begin)
        expected = low_x.int().numpy() @ low_W.int().numpy().T
        for b in range(0, rows, cpu_scan.ROWS):
            sums = multiplied(tiles, x8, b, begin)
            for r in range(min(cpu_scan.ROWS, rows - b)):
                np.testing.assert_array_equal(sums[r][:latents], expected[b + r])


def multiplied(tiles, x8, b, begin):
    """The sums of six rows with all latents."""
    from saehub_native.kernels import cpu_scan

    @cpu_scan.jit
    def all_tiles(tiles, x8, b, begin, out):
        count, steps = tiles.shape[:2]
        weights, sums = tiles.reshape(-1), np.empty(cpu_scan.ROWS * cpu_scan.LATENTS, np.int32)
        for t in range(count):
            cpu_scan.multiply(weights, t, steps, x8, b, begin, sums)
            for r in range(cpu_scan.ROWS):
                for l in range(cpu_scan.LATENTS):
                    out[r, t * cpu_scan.LATENTS + l] = sums[r * cpu_scan.LATENTS + l]

    out = np.empty((cpu_scan.ROWS, tiles.shape[0] * cpu_scan.LATENTS), np.int32)
    all_tiles(tiles, x8, b, begin, out)
    return out
