"""The native trainer's promises: exact continuation, seeds, untouched inputs, checked settings, clear failures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.api import Job
from saehub.errors import FormatError, StageFailed, UsageError
from saehub_native.config import AbsTopKConfig, TopKConfig
from saehub_native.optim import Adam
from saehub_native.schedule import lr_factor
from saehub_native.train import NativeTrainer

pytestmark = pytest.mark.quick

BATCH, D = 128, 24


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_job(name: str = "job", steps: int = 40, **changes) -> Job:
    return dataclasses.replace(Job(name, "resid_post.1", None, D, D, steps, BATCH, steps * BATCH, seed=0), **changes)


def make_rows(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 60 directions, a mean and some noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(60, d, generator=g), dim=1)
    codes = torch.rand(n, 60, generator=g) * (torch.rand(n, 60, generator=g) < 0.06)
    return 3 * codes @ directions + 0.05 * torch.randn(n, d, generator=g) + 0.3


def open_session(job: Job, config: TopKConfig | None = None):
    config = config or TopKConfig(k=6, width=144, batch=BATCH, calibration=256, dead_after=2 * BATCH, k_aux=8)
    y = None if job.target_site is None else make_rows(256, job.d_out, seed=100)
    return NativeTrainer(config).open(job, lambda n: (make_rows(n, job.d_in, seed=99), y))


def feed(session, rows: torch.Tensor, first: int, last: int) -> None:
    for step in range(first, last):
        session.step(rows[step * BATCH : (step + 1) * BATCH])


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in sorted(tensors.items())}


def test_twenty_steps_equal_ten_and_a_fresh_session_and_ten_more(tmp_path):
    rows = make_rows(20 * BATCH)
    straight = open_session(make_job())
    feed(straight, rows, 0, 20)

    first = open_session(make_job())
    feed(first, rows, 0, 10)
    tensors, data = first.state()
    assert (tensors["since_fired"] >= 2 * BATCH).any(), "AuxK was not at work: the test would prove too little"
    save_file(tensors, tmp_path / "state.safetensors")
    feed(first, rows, 10, 12)  # what was saved does not follow

    second = open_session(make_job())
    second.load_state(load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(data)))
    assert second.metrics() != {} and second.steps_done == 10
    shifted = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows)  # the same rows at another memory alignment
    feed(second, shifted, 10, 20)

    expected, expected_data = straight.state()
    found, found_data = second.state()
    assert as_bytes(found) == as_bytes(expected) and found_data == expected_data
    assert second.metrics() == straight.metrics()


def test_a_job_is_the_same_alone_and_beside_another_and_leaves_global_randomness_alone():
    rows = make_rows(6 * BATCH)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = open_session(make_job("a"))
    feed(alone, rows, 0, 6)
    assert torch.equal(torch.get_rng_state(), before)

    torch.manual_seed(2)
    beside, other = open_session(make_job("a")), open_session(make_job("b"), TopKConfig(k=3, width=100, batch=BATCH, calibration=64))
    for step in range(6):
        feed(other, rows, step, step + 1)
        feed(beside, rows, step, step + 1)
    assert as_bytes(beside.state()[0]) == as_bytes(alone.state()[0])


def test_seed_and_id_choose_the_start():
    starts = [open_session(make_job(name, seed=seed)).params["W_enc"] for name, seed in (("a", 0), ("a", 0), ("a", 1), ("b", 0))]
    assert torch.equal(starts[0], starts[1])
    assert not torch.allclose(starts[0], starts[2]) and not torch.allclose(starts[0], starts[3])


def test_inputs_are_not_changed():
    rows = make_rows(3 * BATCH)
    copy = rows.clone()
    session = open_session(make_job())
    feed(session, rows, 0, 3)
    assert torch.equal(rows, copy)
    assert session.params["b_dec"].data_ptr() != rows.data_ptr()


def test_start_takes_its_mean_and_variance_from_calibration_rows_and_norms_stay_one():
    session = open_session(make_job())
    x = make_rows(256, seed=99).double()
    assert torch.allclose(session.params["b_dec"].double(), x.mean(0), atol=1e-6)
    assert session.architecture.constants["variance"] == pytest.approx(float((x - x.mean(0)).pow(2).sum(1).mean()), rel=1e-5)
    feed(session, make_rows(5 * BATCH), 0, 5)
    assert torch.allclose(session.params["W_dec"].norm(dim=1), torch.ones(144), atol=1e-6)


def test_metrics_and_deadness_against_the_batch_itself():
    rows = make_rows(8 * BATCH)
    session = open_session(make_job())
    since = torch.zeros(144, dtype=torch.int64)
    for step in range(8):
        x = rows[step * BATCH : (step + 1) * BATCH].double()
        p = {name: t.double() for name, t in session.params.items()}
        dead = float((since >= 2 * BATCH).double().mean())
        session.step(rows[step * BATCH : (step + 1) * BATCH])
        top = ((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).topk(6)
        f = torch.zeros(BATCH, 144, dtype=torch.float64).scatter(1, top.indices, top.values.relu())
        since = torch.where((f > 0).any(0), 0, since + BATCH)
        found = session.metrics()
        error = (f @ p["W_dec"] + p["b_dec"] - x).pow(2).sum()
        assert found["fvu"] == pytest.approx(float(error / (x - x.mean(0)).pow(2).sum()), rel=1e-4)
        assert found["l0"] == pytest.approx(float((f > 0).sum(1).double().mean()), abs=1e-6)
        assert found["dead"] == pytest.approx(dead, abs=1e-6)
        assert torch.equal(session.since_fired_F, since)
    assert found["lr"] == session.config.peak_lr(session.job) * lr_factor(7, 40, session.config.warmup, session.config.decay)


def test_a_transcoder_with_other_widths_learns_and_asks_for_its_targets():
    job = make_job(steps=150, target_site="mlp_out.1", d_out=16, rows=150 * BATCH)
    x = make_rows(150 * BATCH)
    y = (x.relu() @ torch.randn(D, 16, generator=torch.Generator().manual_seed(3)))
    config = TopKConfig(k=8, width=192, batch=BATCH, calibration=512)
    session = NativeTrainer(config).open(job, lambda n: (x[:n], y[:n]))
    start = None
    for step in range(150):
        session.step(x[step * BATCH : (step + 1) * BATCH], y[step * BATCH : (step + 1) * BATCH])
        start = start or session.metrics()["fvu"]
    assert session.metrics()["fvu"] < 0.5 * start < 0.5
    with pytest.raises(StageFailed, match="got no targets"):
        session.step(x[:BATCH])


def test_rows_of_another_width_are_refused():
    with pytest.raises(StageFailed, match=r"\[128, 25\].*"):
        open_session(make_job()).step(torch.zeros(BATCH, 25))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_is_never_saved(value):
    rows = make_rows(3 * BATCH)
    session = open_session(make_job())
    feed(session, rows, 0, 2)
    good = session.state()
    bad = rows[:BATCH].clone()
    bad[5, 3] = value
    with pytest.raises(StageFailed, match="at step 3 of 40") as failure:
        session.step(bad)
    assert "lr" in failure.value.fix
    with pytest.raises(StageFailed):
        session.state()
    session.load_state(*good)
    feed(session, rows, 2, 3)
    straight = open_session(make_job())
    feed(straight, rows, 0, 3)
    assert as_bytes(session.state()[0]) == as_bytes(straight.state()[0])


def test_parameters_that_are_not_finite_are_never_saved():
    session = open_session(make_job())
    feed(session, make_rows(BATCH), 0, 1)
    session.params["W_enc"][3, 4] = float("nan")
    with pytest.raises(StageFailed, match=r"param\.W_enc"):
        session.state()


def test_a_state_of_another_job_is_refused():
    session = open_session(make_job())
    tensors, data = open_session(make_job(), TopKConfig(k=6, width=100, batch=BATCH, calibration=64)).state()
    with pytest.raises(FormatError, match=r"param\.W_enc"):
        session.load_state(tensors, data)
    tensors, data = session.state()
    with pytest.raises(FormatError, match="version 9"):
        session.load_state(tensors, data | {"version": 9})
    with pytest.raises(StageFailed, match="'triton'"):
        session.load_state(tensors, data | {"kernels": "triton"})


def test_adam_is_adam():
    g = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=g, dtype=torch.float64)
    ours = {"w": start.clone()}
    adam = Adam(ours, (0.8, 0.95))
    reference, m, v = start.numpy().copy(), np.zeros((7, 5)), np.zeros((7, 5))
    for step in range(1, 13):
        grad = torch.randn(7, 5, generator=g, dtype=torch.float64)
        lr = 1e-2 * (1 + step % 3)
        m, v = 0.8 * m + 0.2 * grad.numpy(), 0.95 * v + 0.05 * grad.numpy() ** 2
        reference -= lr * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        adam.step({"w": grad}, lr)
    np.testing.assert_allclose(ours["w"].numpy(), reference, rtol=1e-12, atol=1e-14)


def test_schedule_rises_holds_and_falls():
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11)
    assert all(f == 1 for f in factors[10:80])
    assert factors[80] == pytest.approx(20 / 21) and factors[99] == pytest.approx(1 / 21)
    assert [lr_factor(step, 3, 0.0, 0.0) for step in range(3)] == [1, 1, 1]
    assert lr_factor(0, 1, 1.0, 0.0) == 0.5


@pytest.mark.parametrize(
    ("settings", "job", "words"),
    [
        (dict(k=300, width=144), {}, "k is 300, the dictionary has 144 latents"),
        (dict(k=0), {}, "k is 0"),
        (dict(k=6, expansion=2, width=7), {}, "both given"),
        (dict(k=1, width=0), {}, "width is 0"),
        (dict(k=1, expansion=-1.0), {}, "expansion is -1"),
        (dict(k=6, k_aux=500, width=144), {}, "k_aux is 500"),
        (dict(k=6, dead_after=0), {}, "dead_after is 0"),
        (dict(k=6, auxk_alpha=-1.0), {}, "auxk_alpha"),
        (dict(k=6, revive=-0.1), {}, "revive is -0.1"),
        (dict(k=6, init_blend=1.5), {}, "init_blend"),
        (dict(k=6, freeze_decoder=True, resample=2), {}, "leave one of the two out"),
        (dict(k=6, batch=4096), dict(rows=1000, steps=0, batch=4096), "batch is 4096, the run has 1000 rows"),
        (dict(k=6, batch=0), {}, "batch is 0"),
        (dict(k=6, lr=-1.0), {}, "lr is -1"),
        (dict(k=6, lr=float("nan")), {}, "lr is nan"),
        (dict(k=6, warmup=1.5), {}, "warmup is 1.5"),
        (dict(k=6, warmup=0.6, decay=0.6), {}, "overlap"),
        (dict(k=6, betas=(0.9, 1.0)), {}, "betas"),
        (dict(k=6, clip=0.0), {}, "clip is 0"),
        (dict(k=6, equalize=-1.0), {}, "equalize is -1"),
        (dict(k=6, calibration=0), {}, "calibration is 0"),
        (dict(k=6), dict(d_out=16), "needs d_in = d_out"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, job, words):
    config, job = TopKConfig(**settings), make_job(**job)
    problems = list(config.check(job))
    assert len(problems) == 1 and words in problems[0], problems
    with pytest.raises(UsageError, match="cannot be trained"):
        NativeTrainer(config).open(job, lambda n: (make_rows(n), None))


def test_good_settings_have_no_problem_and_a_plan_needs_no_torch():
    code = """
import sys
from saehub.api import Job
from saehub_native.config import TopKConfig
job = Job("j", "resid_post.6", None, 4096, 4096, 100, 2048, 204800, 0)
config = TopKConfig(k=64, expansion=8)
assert list(config.check(job)) == [] and config.d_sae(job) == 32768 and config.architecture() == "topk"
assert config.memory(job) > 5 * 4 * 2 * 4096 * 32768, config.memory(job)
assert TopKConfig(k=64).d_sae(job) == 32768 and TopKConfig(k=64, width=1000).d_sae(job) == 1000
import saehub_native
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("transcoder", [False, True])
def test_finish_gives_the_sae_that_was_trained(transcoder):
    job = make_job(target_site="mlp_out.1", d_out=16) if transcoder else make_job()
    x = make_rows(5 * BATCH)
    y = make_rows(5 * BATCH, 16, seed=4) if transcoder else None
    session = open_session(job)
    for step in range(5):
        part = slice(step * BATCH, (step + 1) * BATCH)
        session.step(x[part], None if y is None else y[part])
    sae = session.finish()
    p = {name: t.double() for name, t in session.params.items()}
    rows = make_rows(50, seed=7).double()
    top = ((rows if transcoder else rows - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).topk(6)
    f = torch.zeros(50, 144, dtype=torch.float64).scatter(1, top.indices, top.values.relu())
    assert torch.allclose(sae.encode(rows, dtype=torch.float64), f, atol=1e-9)
    assert torch.allclose(sae.decode(f, dtype=torch.float64), f @ p["W_dec"] + p["b_dec"], atol=1e-9)
    assert sae.config.architecture == "topk" and sae.config.params["k"] == 6
    assert sae.config.kind == ("transcoder" if transcoder else "autoencoder") and sae.config.subtract_b_dec is not transcoder
    assert all(t.dtype == torch.float32 for t in sae.tensors().values())
    kept = sae.tensors()["W_dec"].clone()
    session.step(x[:BATCH], None if y is None else y[:BATCH])
    assert torch.equal(sae.tensors()["W_dec"], kept), "the SAE must not change when training goes on"


def test_warm_start_begins_with_the_checkpoint(tmp_path):
    from saehub.checkpoint.format import save

    source = open_session(make_job())
    feed(source, make_rows(5 * BATCH), 0, 5)
    save(source.finish(), tmp_path / "sae")
    warm = open_session(make_job("warm", init_from=str(tmp_path / "sae")))
    for name, p in source.params.items():
        assert torch.allclose(warm.params[name], p, rtol=1e-5, atol=1e-6), name
    feed(warm, make_rows(5 * BATCH), 0, 1)
    narrow = TopKConfig(k=6, width=100, batch=BATCH, calibration=64)
    with pytest.raises(UsageError, match="cannot start the training"):
        open_session(make_job("narrow", init_from=str(tmp_path / "sae")), narrow)


def test_the_learning_rate_rule_falls_with_width_and_steps_and_has_both_ends():
    config = TopKConfig(k=6, width=1280)
    assert config.peak_lr(make_job(steps=1000)) == pytest.approx(8 / (1280 * 1000) ** 0.5)
    assert config.peak_lr(make_job(steps=1)) == 0.02 and AbsTopKConfig(k=6).peak_lr(make_job(steps=1)) == 0.0125
    assert config.peak_lr(make_job(steps=10**7)) == pytest.approx(2e-4 / (1280 / 2**14) ** 0.5, rel=1e-3)
    assert TopKConfig(k=6, width=4 * 1280).peak_lr(make_job(steps=1000)) == pytest.approx(config.peak_lr(make_job(steps=1000)) / 2)
    assert TopKConfig(k=6, lr=0.5).peak_lr(make_job()) == 0.5


def test_dead_rows_scale_with_the_run():
    assert [TopKConfig(k=6, batch=100).dead_rows(make_job(rows=rows)) for rows in (1000, 64_000, 10**10)] == [800, 2000, 10_000_000]
    assert TopKConfig(k=6, dead_after=7).dead_rows(make_job()) == 7


def test_the_memory_that_a_plan_states_covers_what_training_takes():
    """Peak resident growth of a fresh process over three steps of a wide dictionary, all latents dead from the second on."""
    code = """
import torch
from saehub.api import Job
from saehub.pipeline.environment import peak_resident as peak
from saehub_native.config import TopKConfig
from saehub_native.train import NativeTrainer
torch.set_num_threads(1)
def train(width, d, batch):
    config = TopKConfig(k=8, width=width, batch=batch, calibration=512, dead_after=1)
    job = Job("j", "resid_post.0", None, d, d, 3, batch, 3 * batch, 0)
    x = torch.randn(3 * batch, d)
    before = peak()
    session = NativeTrainer(config).open(job, lambda n: (x[:n], None))
    for step in range(3):
        session.since_fired_F += 5
        session.step(x[step * batch : (step + 1) * batch])
    return peak() - before, config.memory(job)
train(512, 256, 512)  # loops are compiled where no cache has them; that is not training's memory
took, stated = train(16384, 256, 512)
assert 0.4 * stated < took < 1.1 * stated, (took / 2**20, stated / 2**20)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
