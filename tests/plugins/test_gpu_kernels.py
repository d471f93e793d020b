"""The Triton kernels in; proof that they compute what plain torch and float64 do, and compile for a GPU that need not be there, out.

Each in a process of its own: Triton's interpreter is switched on before Triton is imported, and compiling needs it off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
KERNELS = (
    "encode", "threshold", "gather", "refine", "select", "choose", "exact", "histogram", "batch", "reconstruct", "group", "totals", "latents",
    "bound", "update", "auxk", "step", "training",
)  # fmt: skip


def run(path: Path, *words: str, **environment: str) -> dict:
    """The script's report."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SAEHUB_KERNELS", "CUDA_VISIBLE_DEVICES")
    }
    command = [sys.executable, str(SCRIPT), *words, "--json", str(path)]
    done = subprocess.run(
        command, env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True, timeout=1500, check=False
    )
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> list[dict]:
    """What `gpu.py --check` found; torch resolves triton where its wheel depends on it (Linux)."""
    assert find_spec("triton"), "torch's Linux wheels bring triton"
    return run(tmp_path_factory.mktemp("gpu") / "checks.json", "--check", TRITON_INTERPRET="1")["checks"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_in_the_interpreter(checks, kernel):
    rows = [row for row in checks if row["what"].split(":")[0].split(",")[0] == kernel]
    assert rows and all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


def test_nothing_else_is_wrong_in_the_interpreter(checks):
    """Among it: a group of checks that raised."""
    assert all(row["ok"] for row in checks), [row for row in checks if not row["ok"]]


def test_every_kernel_compiles_for_compute_capability_9(tmp_path):
    compiled = run(tmp_path / "compiled.json", "--compile")["compiled"]
    from saehub_native.kernels import triton_batch, triton_dead, triton_encode, triton_latents

    modules = {"encode": triton_encode, "latents": triton_latents, "dead": triton_dead, "batch": triton_batch}
    helpers = {"key_bits", "nth_largest", "above", "noise", "decoded", "encoded", "block_maxima", "over_pairs"}  # inlined into the others
    kernels = {
        f"{name}.{kernel}" for name, module in modules.items() for kernel, thing in vars(module).items()
        if hasattr(thing, "arg_names") and thing.__module__ == module.__name__ and kernel not in helpers
    }  # fmt: skip
    assert {row["kernel"] for row in compiled} == kernels
    wrong = [row for row in compiled if "failed" in row or row["bytes"] < 1000 or row["shared"] > 227 * 1024]  # what a block can have there
    assert not wrong, wrong


@pytest.mark.quick
def test_they_are_not_chosen_by_themselves(monkeypatch):
    """Not measured on a GPU yet: plain torch runs there unless SAEHUB_KERNELS=gpu asks for them."""
    from saehub.errors import StageFailed
    from saehub_native.kernels import pick

    monkeypatch.delenv("SAEHUB_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert pick("cuda").name == "reference"
    monkeypatch.setenv("SAEHUB_KERNELS", "gpu")
    with pytest.raises(StageFailed, match="which are not there"):
        pick("cpu")


@pytest.mark.quick
def test_what_is_not_recorded_is_said():
    from saehub_native.config import BatchTopKConfig, TopKConfig
    from saehub_native.kernels.replay import why_not

    gpu, steady = SimpleNamespace(name="gpu"), SimpleNamespace(rule="top", static=True)
    assert why_not(TopKConfig(k=4), steady, gpu) is None
    assert "the kernels are cpu" in why_not(TopKConfig(k=4), steady, SimpleNamespace(name="cpu"))
    assert "batch to batch with batchtopk" in why_not(BatchTopKConfig(k=4), SimpleNamespace(rule="top", static=False), gpu)
    assert "muon" in why_not(TopKConfig(k=4, optimizer="muon"), steady, gpu)
    assert "k_anneal" in why_not(TopKConfig(k=4, k_anneal=0.5), steady, gpu)


class Recorder:
    """In place of a CUDA device's graphs: `graph` records nothing, `replay` runs the work anew."""

    def __init__(self, monkeypatch, refuse: bool = False):
        self.calls, self.inside = [], False
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.calls.append("replayed")))
        recorder = self

        class Graph:
            def __init__(self, graph, **_):
                pass

            def __enter__(self):
                recorder.inside = not refuse
                if refuse:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")

            def __exit__(self, *_):
                recorder.inside = False

        monkeypatch.setattr(torch.cuda, "graph", Graph)

    def work(self, x_BD, y_BD, numbers_3):
        self.calls.append("recorded" if self.inside else "run")
        self.seen = (x_BD.data_ptr(), float(x_BD.sum()), numbers_3.tolist())
        return x_BD


@pytest.mark.quick
@pytest.mark.parametrize("refuse", [False, True])
def test_what_is_recorded_and_when(monkeypatch, refuse):
    """Three steps to warm up; then one recording, played back, but for the audits; anew after a raised r; op by op, with the reason, if refused."""
    from saehub_native.kernels.replay import Replay
    from saehub_native.optim import Adam

    recorder = Recorder(monkeypatch, refuse)
    kernels = SimpleNamespace(r=8, selections=1, low=lambda W: None, audit_due=lambda: kernels.selections % 6 == 0)
    W_FD = torch.zeros(3, 2)
    replay = Replay(recorder.work, Adam({"W": W_FD}), kernels, W_FD)
    addresses = set()

    def step(number: int) -> list[str]:
        recorder.calls.clear()
        before = kernels.selections
        x_BD = torch.full((2, 2), float(number))
        replay(x_BD, x_BD, 0.1)
        if "replayed" not in recorder.calls:
            kernels.selections = before + 1  # what the work itself does
            assert recorder.seen[1] == 4.0 * number and recorder.seen[2][2] == replay.optimizer.t
        assert kernels.selections == before + 1
        addresses.add(recorder.seen[0])
        return list(recorder.calls)

    history = [step(number) for number in range(8)]
    run, replayed = ["run"], ["replayed"]
    if refuse:
        assert history == [run] * 8 and replay.reason == "RuntimeError: operation not permitted when stream is capturing"
        return
    assert history == [run, run, run, ["recorded", *replayed], replayed, run, replayed, replayed]  # the sixth is audited
    assert len(addresses) == 1
    kernels.r = 16
    assert [step(number) for number in range(8, 12)] == [run, run, run, run]  # the last one is audited
    assert step(12) == ["recorded", *replayed]


# ---------------------------------------------------------------------- 8-bit moments in plain torch
@pytest.mark.quick
def test_codes_are_unbiased_and_ordered():
    """Every code decodes to itself; rounding at random has the share as its expectation, and v is never rounded to 0."""
    from saehub_native.optim8 import LAST_M, LAST_V, decoded, encoded, noise

    for last, keep in ((LAST_M, False), (LAST_V, True)):
        codes = torch.arange(last + 1)
        shares = decoded(codes, last)
        assert (shares.diff() > 0).all() and shares[0] == 0 and shares[-1] == 1
        assert (shares[2:] / shares[1:-1]).max() <= 1.125
        assert torch.equal(encoded(shares, torch.zeros(last + 1, dtype=torch.int32), last, keep).long(), codes)
        draws = torch.arange(200_000)
        random = noise(draws, 7) & 0xFFFFF
        for share in (0.9, 0.3141, 0.002, float(shares[1]) / 3):
            mean = float(decoded(encoded(torch.full((200_000,), share), random, last, keep), last).double().mean())
            expected = float(shares[1]) if keep and share < shares[1] else share
            assert abs(mean / expected - 1) < 0.01
        tiny = encoded(torch.full((1000,), float(shares[1]) * 1e-3), random[:1000], last, keep)
        assert tiny.min() == (1 if keep else 0)


def eight_bit_session(bits: int, steps: int, monkeypatch, kernels: str = "reference", seed: int = 0):
    from saehub.api import Job
    from saehub_native.config import TopKConfig
    from saehub_native.train import NativeTrainer

    monkeypatch.setenv("SAEHUB_KERNELS", kernels)
    job = Job("eight", "resid_post.0", None, 32, 32, steps, 256, steps * 256, seed, device="cpu")
    config = TopKConfig(k=6, width=192, batch=256, adam_bits=bits)
    return NativeTrainer(config).open(job, lambda n: (planted(2048, 99), None))


def planted(n: int, seed: int):
    """Sparse non-negative sums of 128 fixed directions in 32 dimensions, with noise."""
    draw = torch.Generator().manual_seed(seed)
    D_FD = torch.nn.functional.normalize(torch.randn(128, 32, generator=torch.Generator().manual_seed(5)), dim=1)
    f_NF = torch.rand(n, 128, generator=draw) * (torch.rand(n, 128, generator=draw) < 0.04)
    return f_NF @ D_FD * 3 + 0.05 * torch.randn(n, 32, generator=draw)


def test_eight_bits_train_as_well_as_thirty_two(monkeypatch):
    """FVU on rows not trained on. Two short trainings differ by about 1 % for chance alone: tests/benchmarks/adam_bits.py takes more seeds."""
    fvu: dict[int, float] = {8: 0.0, 32: 0.0}
    fresh = planted(4096, 1234)
    for bits in fvu:
        for seed in range(2):
            session = eight_bit_session(bits, 250, monkeypatch, seed=seed)
            for step in range(250):
                session.step(planted(256, 1000 * seed + step))
            with torch.no_grad():
                error = session.finish()(fresh) - fresh
            fvu[bits] += float(error.square().sum() / (fresh - fresh.mean(0)).square().sum()) / 2
    assert fvu[8] < 0.3 and fvu[8] / fvu[32] < 1.03, fvu


@pytest.mark.quick
def test_eight_bit_state_resumes_bit_for_bit(monkeypatch):
    whole, half, other = (eight_bit_session(8, 12, monkeypatch) for _ in range(3))
    for step in range(12):
        whole.step(planted(256, step))
        if step < 6:
            half.step(planted(256, step))
    tensors, data = half.state()
    assert tensors["adam.m.W_enc"].dtype == torch.uint8 and tensors["adam.v_scale.W_dec"].dtype == torch.float32
    other.load_state({name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(data)))
    for step in range(6, 12):
        other.step(planted(256, step))
    assert all(torch.equal(whole.params[name], other.params[name]) for name in whole.params)


@pytest.mark.quick
def test_eight_bits_without_adam_are_refused_at_plan():
    from saehub.api import Job
    from saehub_native.config import TopKConfig

    job = Job("eight", "resid_post.0", None, 32, 32, 8, 256, 8 * 256, 0, device="cpu")
    assert any(
        "adam_bits is 8, but the optimizer is muon" in problem for problem in TopKConfig(k=6, adam_bits=8, optimizer="muon").check(job)
    )
