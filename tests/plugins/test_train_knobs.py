"""Every architecture with every knob stops and goes on bit for bit; optimizers against their libraries, resampling against its equation."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.api import Job
from saehub_native import TRAINERS
from saehub_native.config import BatchTopKConfig, MatryoshkaConfig, TopKConfig
from saehub_native.config_dense import GatedConfig, JumpReLUConfig, ReLUConfig
from saehub_native.optim_libraries import Muon, ScheduleFree
from saehub_native.train import NativeTrainer

pytestmark = pytest.mark.quick

BATCH, D, F = 96, 20, 80
CASES = {
    "topk": (TopKConfig, {"k": 4}),
    "topk muon anneal resample": (TopKConfig, {"k": 4, "optimizer": "muon", "k_anneal": 0.8, "resample": 2}),
    "batchtopk schedule_free": (BatchTopKConfig, {"k": 4, "optimizer": "schedule_free"}),
    "matryoshka resample anneal": (MatryoshkaConfig, {"k": 4, "resample": 3, "k_anneal": 0.9}),
    "relu p-anneal target": (ReLUConfig, {"target_l0": 4.0, "p_anneal": 0.6}),
    "relu muon resample": (ReLUConfig, {"sparsity": 0.05, "optimizer": "muon", "resample": 2}),
    "jumprelu tanh resample": (JumpReLUConfig, {"target_l0": 4.0, "resample": 2, "preact": 1e-3}),
    "jumprelu l0 schedule_free": (JumpReLUConfig, {"target_l0": 4.0, "penalty": "l0", "optimizer": "schedule_free"}),
    "gated resample": (GatedConfig, {"target_l0": 4.0, "resample": 2}),
    "topk frozen": (TopKConfig, {"k": 4, "freeze_decoder": True}),
    "relu frozen muon": (ReLUConfig, {"sparsity": 0.05, "freeze_decoder": True, "optimizer": "muon"}),
    "batchtopk frozen schedule_free": (BatchTopKConfig, {"k": 4, "freeze_decoder": True, "optimizer": "schedule_free"}),
}


def rows(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 50 directions, a mean and some noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(50, d, generator=g), dim=1)
    codes = torch.rand(n, 50, generator=g) * (torch.rand(n, 50, generator=g) < 0.06)
    return 3 * codes @ directions + 0.05 * torch.randn(n, d, generator=g) + 0.3


def open_session(name: str, skip: bool = False, steps: int = 20):
    make, settings = CASES[name]
    config = make(**{"width": F, "batch": BATCH, "calibration": 256, "dead_after": 2 * BATCH, "skip": skip} | settings)
    job = Job("job", "resid_post.1", "mlp_out.1" if skip else None, D, 12 if skip else D, steps, BATCH, steps * BATCH, seed=0)
    session = NativeTrainer(config).open(job, lambda n: (rows(256, seed=9)[:n], rows(256, 12, seed=8)[:n] if skip else None))
    dead = session.params["b_gate" if "gated" in name else "b_enc"]
    dead[: F // 4] -= 5.0  # something to resample and to revive
    return session


def feed(session, x, y, first: int, last: int) -> None:
    for step in range(first, last):
        part = slice(step * BATCH, (step + 1) * BATCH)
        session.step(x[part], None if session.job.target_site is None else y[part])


@pytest.mark.parametrize("skip", [False, True], ids=["autoencoder", "skip transcoder"])
@pytest.mark.parametrize("name", CASES)
def test_stopped_and_restored_it_ends_on_the_same_bits(name, skip, tmp_path):
    x, y = rows(20 * BATCH), rows(20 * BATCH, 12, seed=3)
    straight = open_session(name, skip)
    feed(straight, x, y, 0, 20)
    assert straight.metrics()["loss"] == straight.metrics()["loss"]

    first = open_session(name, skip)
    feed(first, x, y, 0, 9)
    tensors, data = first.state()
    save_file(tensors, tmp_path / "state.safetensors")
    feed(first, x, y, 9, 11)
    second = open_session(name, skip)
    second.load_state(load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(data, allow_nan=False)))
    feed(second, x, y, 9, 20)
    (left, left_data), (right, right_data) = straight.state(), second.state()
    assert left_data == right_data and set(left) == set(right)
    assert [n for n in left if not torch.equal(left[n], right[n])] == []
    left, right = straight.finish().tensors(), second.finish().tensors()
    assert [n for n in left if not torch.equal(left[n], right[n])] == []


def test_every_native_trainer_is_stopped_and_restored_here_or_shares_the_code_of_one():
    shared = {"abstopk", "groupmax"}  # a selection rule of the same class, without state
    assert {name for name, *_ in TRAINERS} - shared == {name.split()[0] for name in CASES} - {"matryoshka"} | {"matryoshka_batchtopk"}


@pytest.mark.parametrize("optimizer", ["muon", "schedule_free"])
def test_optimizers_equal_their_libraries_driven_by_autograd(optimizer):
    """The same quadratic by torch's parameters and backward(), and by our gradients; biases of Muon by torch.optim.Adam."""
    g = torch.Generator().manual_seed(0)
    start = {"W": torch.randn(9, 6, generator=g), "b": torch.randn(9, generator=g)}
    ours = {name: p.clone() for name, p in start.items()}
    theirs = {name: p.clone().requires_grad_() for name, p in start.items()}
    if optimizer == "muon":
        mine = Muon(ours, (0.9, 0.999))
        libraries = [
            torch.optim.Muon([theirs["W"]], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.Adam([theirs["b"]], betas=(0.9, 0.999)),
        ]
    else:
        from schedulefree import AdamWScheduleFree

        mine = ScheduleFree(ours, (0.9, 0.999))
        libraries = [AdamWScheduleFree(theirs.values(), betas=(0.9, 0.999), foreach=False)]
        libraries[0].train()
    for step in range(12):
        lr = 0.02 * (1 + step % 3)
        target = torch.randn(9, generator=g)
        for library in libraries:
            library.param_groups[0]["lr"] = lr
            library.zero_grad()
        ((theirs["W"].sum(1) + theirs["b"] - target).square().sum() + theirs["W"].square().sum()).backward()
        for library in libraries:
            library.step()
        miss = 2 * (ours["W"].sum(1) + ours["b"] - target)
        mine.step({"W": miss[:, None] + 2 * ours["W"], "b": miss}, lr)
    if optimizer == "schedule_free":
        libraries[0].eval()
    for name, p in mine.result().items():
        assert torch.allclose(p, theirs[name].detach(), atol=2e-3 if optimizer == "muon" else 1e-5), name  # muon: bfloat16 inside
    assert mine.t == 12


def test_schedule_free_gives_the_average_and_never_decays():
    session = open_session("batchtopk schedule_free")
    assert session.config.last_decay == 0
    feed(session, rows(20 * BATCH), None, 0, 20)
    assert session.metrics()["lr"] == session.config.peak_lr(session.job)
    averaged = session.optimizer.result()["W_dec"]
    assert torch.equal(session.finish().tensors()["W_dec"], averaged) and not torch.equal(averaged, session.params["W_dec"])


@pytest.mark.parametrize("name", [name for name in CASES if "frozen" in name])
def test_a_frozen_decoder_is_random_keeps_its_bits_and_the_rest_learns(name):
    session, x = open_session(name), rows(20 * BATCH)
    first = {key: p.clone() for key, p in session.params.items()}
    assert torch.allclose(first["W_dec"].norm(dim=1), torch.ones(F), atol=1e-5)
    other = NativeTrainer(session.config).open(session.job, lambda n: (rows(256, seed=77)[:n], None))
    assert torch.equal(other.params["W_dec"], first["W_dec"])  # no row of the data is in it
    feed(session, x, None, 0, 20)
    assert torch.equal(session.finish().tensors()["W_dec"], first["W_dec"])
    assert not any(torch.equal(session.params[key], p) for key, p in first.items() if key != "W_dec")
    assert not any("W_dec" in key for key in session.optimizer.state())


def test_beside_a_frozen_decoder_the_rest_takes_the_steps_of_torch_adam(monkeypatch):
    """Gradients of the architecture (float64 autograd is their reference elsewhere), clipped, multiplied by FVU^−0.5 and used by torch without
    the decoder's."""
    monkeypatch.setenv("SAEHUB_KERNELS", "reference")
    config = TopKConfig(k=4, width=F, batch=BATCH, calibration=256, freeze_decoder=True, clip=0.1, lr=0.01, warmup=0.0, decay=0.0, dead_after=10**6)
    job = Job("job", "resid_post.1", None, D, D, 12, BATCH, 12 * BATCH, seed=0)
    session, x = NativeTrainer(config).open(job, lambda n: (rows(256, seed=9)[:n], None)), rows(12 * BATCH)
    theirs = {name: p.clone() for name, p in session.params.items()}
    taught = [theirs[name] for name in ("W_enc", "b_enc", "b_dec")]
    adam, clipped = torch.optim.Adam(taught, lr=0.01), []
    for step in range(12):
        x_BD = x[step * BATCH : (step + 1) * BATCH]
        result = session.architecture.gradients(theirs, x_BD, x_BD, torch.zeros(F, dtype=torch.bool), step)
        for name in ("W_enc", "b_enc", "b_dec"):
            theirs[name].grad = result.grads[name].clone()
        clipped.append(float(torch.nn.utils.clip_grad_norm_(taught, 0.1)) > 0.1)
        fvu = float(result.squared_error) / (BATCH * session.architecture.constants["variance"])
        for parameter in taught:
            parameter.grad *= fvu**-0.5
        adam.step()
        session.step(x_BD)
    assert any(clipped) and not all(clipped)  # the factor differs between steps, so Adam feels it
    for name, p in theirs.items():
        assert float((session.params[name] - p).norm() / p.norm()) <= 1e-3, name


def test_dead_latents_are_drawn_anew_from_rows_that_are_reconstructed_badly():
    x = rows(20 * BATCH)
    session = open_session("matryoshka resample anneal", steps=20)
    assert session.config.resampling_steps(session.job) == [3, 7, 10]
    x[2 * BATCH + 5] = 40 * torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(1)), dim=0)  # one very bad row
    feed(session, x, None, 0, 2)
    dead = session.since_fired_F >= session.dead_rows
    assert dead.sum() >= F // 8
    before = {name: p.clone() for name, p in session.params.items()}
    feed(session, x, None, 2, 3)
    dead &= session.params["b_enc"] == 0  # but for one that came back by itself
    direction = torch.nn.functional.normalize(x[2 * BATCH + 5] - session.params["b_dec"], dim=0)
    cosines = session.params["W_dec"][dead] @ direction
    assert (cosines > 0.999).double().mean() > 0.9, "|e|^4 of that row outweighs all others"
    alive = ~dead
    norms = session.params["W_enc"].norm(dim=1)
    assert torch.allclose(norms[dead], 0.2 * norms[alive].mean().expand(int(dead.sum())), rtol=1e-4)
    assert dead.sum() >= F // 8 and (session.since_fired_F[dead] == 0).all() and (session.optimizer.m["W_enc"][dead] == 0).all()
    assert (session.params["W_dec"][alive] - before["W_dec"][alive]).abs().max() < 0.1, "the living are left alone"


def test_settings_that_cannot_work_are_named(monkeypatch):
    job = Job("j", "resid_post.1", None, D, D, steps=10, batch=BATCH, rows=960, seed=0)
    config = TopKConfig(k=4, width=F, batch=BATCH)
    assert "resample is 6" in next(dataclasses.replace(config, resample=6).check(job))
    monkeypatch.setattr("saehub_native.config.find_spec", lambda name: None)
    assert "saehub[schedule-free]" in next(dataclasses.replace(config, optimizer="schedule_free").check(job))


@pytest.mark.parametrize(("name", "settings"), [("jumprelu", {"target_l0": 8.0}), ("topk", {"k": 8, "optimizer": "schedule_free"})])
def test_the_memory_that_a_plan_states_covers_what_training_takes(name, settings):
    """Peak resident growth of a fresh process over three steps of a wide dictionary, all latents dead from the second on."""
    code = f"""
import torch
from saehub.api import Job
from saehub.pipeline.environment import peak_resident as peak
from saehub.plugins import catalog
from saehub_native.train import NativeTrainer
torch.set_num_threads(1)
def train(width, d, batch):
    config = catalog().find("trainer", "native/{name}").load_config()(width=width, batch=batch, calibration=512, dead_after=1, **{settings})
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
