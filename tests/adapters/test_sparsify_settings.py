"""Sparsify's trainers without Sparsify: what their settings refuse and say, how a pulling fit() is pushed, and what a library that has drifted is told."""

from __future__ import annotations

import gc
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch
from saehub_sparsify import config as settings
from saehub_sparsify import library
from saehub_sparsify.names import hookpoint
from saehub_sparsify.replay import Bar, Batches, Gate, ReplayModel

from saehub.api import Job, ModelShape
from saehub.errors import MissingDependency, StageFailed, UsageError

pytestmark = pytest.mark.quick

JOB = Job("j", "resid_post.1", None, 16, 16, 100, 64, 6400, 0)
ACROSS = replace(JOB, site="mlp_in.1", target_site="mlp_out.1")
LLAMA = ModelShape("llama", 2, 16, 64, 2, 8, 100, 64)


@pytest.mark.parametrize(
    ("config", "job", "expected"),
    [
        (settings.TopKConfig(k=0), JOB, ["k is 0; it must lie between 1 and the 512 latents"]),
        (settings.TopKConfig(k=9, width=8), JOB, ["k is 9"]),
        (settings.TopKConfig(width=8, expansion=2.0), JOB, ["expansion 2 and width 8", "k is 32"]),
        (settings.TopKConfig(optimizer="adam", warmup=100), JOB, ["warmup is 100 steps of 100"]),
        (settings.TopKConfig(optimizer="signum", warmup=100), JOB, []),
        (settings.TopKConfig(lr=0.0, auxk_alpha=-1.0, micro_acc_steps=0), JOB, ["micro_acc_steps is 0", "lr is 0", "auxk_alpha is -1"]),
        (settings.TopKConfig(k_decay_steps=101), JOB, ["k_decay_steps is 101 and the run has 100 steps"]),
        (settings.TopKConfig(), ACROSS, ["target_site mlp_out.1 is for a transcoder; use sparsify/transcoder"]),
        (settings.TopKConfig(), replace(JOB, d_out=20), ["sparsify's b_dec has the width of the input: d_in 16 must be d_out 20"]),
        (settings.GroupMaxConfig(k=32, width=500), JOB, ["k is 32: groupmax takes the largest latent of each of k equal groups, and 500 latents are not a multiple of it; width 480 or 512"]),
        (settings.GroupMaxConfig(k_decay_steps=10), JOB, ["k_decay_steps does not go with groupmax"]),
        (settings.MultiTopKConfig(k=20, width=64), JOB, ["k is 20: multi_topk takes 4k = 80 latents and there are 64"]),
        (settings.MultiTopKConfig(k=8, width=256, k_decay_steps=10), JOB, ["k is 160 at first: multi_topk takes 4k = 640"]),
        (settings.TranscoderConfig(), JOB, ["target_site is missing"]),
        (settings.SkipTranscoderConfig(activation="groupmax", k=5, width=64), ACROSS, ["k is 5: groupmax"]),
        (settings.SkipTranscoderConfig(), replace(ACROSS, d_out=20), ["sparsify's b_dec"]),
        (settings.EndToEndConfig(skip_connection=True), JOB, ["skip_connection is for transcoders"]),
        (settings.EndToEndConfig(skip_connection=True), ACROSS, []),
    ],
)  # fmt: skip
def test_what_is_refused(config, job, expected):
    found = list(config.check(job))
    assert len(found) == len(expected)
    assert all(any(text.startswith(start) for text in found) for start in expected), found


def test_what_a_user_is_told():
    said = {name: list(cls().cautions(JOB)) for name, cls in vars(settings).items() if name in ("TopKConfig", "MultiTopKConfig")}
    assert said == {"TopKConfig": [settings.NO_RELU_MASK], "MultiTopKConfig": [settings.NO_RELU_MASK, settings.MULTI_TOPK_IDLE]}
    assert settings.AUXK_IDLE in list(settings.TopKConfig(auxk_alpha=0.1).cautions(JOB))
    assert any("identity" in text for text in settings.EndToEndConfig(loss="ce").cautions(ACROSS))
    assert settings.TopKConfig().inexact_resume(JOB) is None and "index_add_" in settings.TopKConfig().inexact_resume(replace(JOB, device="cuda:0"))
    assert settings.TopKConfig().warmup_steps(JOB) == 10 and settings.TopKConfig().warmup_steps(replace(JOB, steps=50_000)) == 1000


def test_hookpoints():
    assert hookpoint("resid_post.1", None, LLAMA) == "layers.1"
    assert hookpoint("mlp_in.1", None, LLAMA) == "layers.1.post_attention_layernorm"
    assert hookpoint("attn_out.1", None, LLAMA) == "layers.1.self_attn.o_proj"  # self_attn takes keyword arguments only
    assert hookpoint("mlp_in.1", "mlp_out.1", LLAMA) == "layers.1.mlp"
    for site, target in (("attn_z.1", None), ("mlp_in.0", "mlp_out.1"), ("resid_post.0", "resid_post.1")):
        with pytest.raises(UsageError):
            hookpoint(site, target, LLAMA)
    assert "less than one sequence of 128" in next(settings.EndToEndConfig(batch=64).check_model(JOB, LLAMA, 128))


def test_fit_goes_on_only_when_pushed():
    seen: list[int] = []

    def fit() -> None:
        bar = Bar(desc="Training", disable=False)
        for step in range(100):
            seen.append(step)
            bar.update()

    gate = Gate(fit, "cpu")
    assert not gate.running and seen == []
    for step in range(3):
        gate.advance()
        assert seen == list(range(step + 1)) and gate.running
    gate.stop()
    assert not gate.running and not any(thread.name == "sparsify-fit" for thread in threading.enumerate())
    gate.advance()  # a new fit()
    assert seen == [0, 1, 2, 0]
    gate.stop()


def test_what_fit_raises_comes_out_and_its_end_is_an_error():
    def fails() -> None:
        Bar().update()
        raise ValueError("the library's own words")

    gate = Gate(fails, "cpu")
    gate.advance()
    for _ in range(2):
        with pytest.raises(ValueError, match="the library's own words"):
            gate.advance()
    with pytest.raises(StageFailed, match="ended before its last step"):
        Gate(lambda: None, "cpu").advance()


def test_replayed_rows_are_used_once():
    model = ReplayModel(3, "cpu")
    model(**model.dummy_inputs)
    x_BD, y_BD = torch.randn(4, 3), torch.randn(4, 3)
    shown = []
    model.site.register_forward_hook(lambda _module, inputs, output: shown.append((inputs[0], output)))
    model.rows = (x_BD, y_BD)
    ids = Batches(5, 4)[0]["input_ids"][None]
    model(ids)
    assert torch.equal(shown[0][0][0], x_BD) and torch.equal(shown[0][1][0], y_BD)
    with pytest.raises(StageFailed, match="a second batch within a step"):
        model(ids)
    assert len(Batches(5, 4).select(range(2, 5))) == 3


def test_a_library_that_has_drifted(monkeypatch):
    """A simulated missing attribute, and a missing setting: both versions are named, and the command that helps."""
    for name in ("sparsify", "sparsify.trainer", "sparsify.sparse_coder"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    trainer = type("Trainer", (), {"__init__": lambda self, cfg, dataset, model: None})
    monkeypatch.setattr(sys.modules["sparsify.trainer"], "Trainer", trainer, raising=False)
    with pytest.raises(MissingDependency, match="Trainer has no 'fit'") as error:
        library.training()
    assert "1.3.3" in error.value.why and error.value.fix == "pip install 'eai-sparsify==1.3.3'"
    monkeypatch.setattr(trainer, "fit", lambda self: None, raising=False)
    monkeypatch.setattr(sys.modules["sparsify"], "SparseCoderConfig", lambda activation, num_latents, k: None, raising=False)
    with pytest.raises(MissingDependency, match="no longer takes multi_topk, normalize_decoder"):
        library.training()


def test_a_session_that_is_dropped_ends_its_thread():
    import weakref

    class Owner:
        """Holds a gate as a session does."""

    owner, gate = Owner(), Gate(lambda: [Bar().update() for _ in range(9)], "cpu")
    weakref.finalize(owner, gate.stop)
    gate.advance()
    del owner
    gc.collect()
    assert not gate.running
