"""dictionary_learning's trainers in a run that loses its worker halfway and goes on: what comes out, beside the library driven directly on the same rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.api import Job
from saehub.checkpoint.format import load, read_header
from saehub.errors import MissingDependency, SaehubError
from saehub.pipeline import train as pipeline_train
from saehub.pipeline.components import WorkerProcess
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.testing.toys import tiny_model, tiny_text
from saehub_dictionary_learning import config as settings
from saehub_dictionary_learning import library

BATCH, STEPS, SEED = 100, 40, 3
WARM = {"warmup_steps": 4, "lr": 0.01}
SPARSE = {**WARM, "sparsity_warmup_steps": 8}
TOPK = {**WARM, "k": 4, "threshold_start_step": 10, "threshold_beta": 0.9}
ANNEAL = {**SPARSE, "anneal_start": 15, "n_sparsity_updates": 5, "initial_sparsity_penalty": 0.2, "sparsity_function": "Lp^p"}
JOBS = {
    "standard": {**SPARSE, "l1_penalty": 0.6, "resample_steps": 12},
    "standard_april": {**SPARSE, "l1_penalty": 0.2, "decay_start": 30},
    "topk": {**TOPK, "auxk_alpha": 0.05},
    "batch_topk": TOPK,
    "matryoshka_batch_topk": {**TOPK, "group_fractions": [0.25, 0.75]},
    "jump_relu": {**SPARSE, "target_l0": 4.0, "bandwidth": 0.05, "sparsity_penalty": 0.5},
    "gated": {**SPARSE, "l1_penalty": 0.2},
    "p_anneal": ANNEAL,
    "gated_anneal": ANNEAL,
}
DEAD_AFTER = {"topk": 300, "batch_topk": 300, "matryoshka_batch_topk": 300}
RAW = ("gated", "topk")
"""Trained without the norm."""
OURS = {
    "relu": {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "bias"},
    "topk": {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"},
    "batchtopk": {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec", "threshold": "threshold"},
    "matryoshka": {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "group_sizes")},
    "jumprelu": {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
    "gated": {
        "W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", "b_dec": "decoder_bias",
        "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag",
    },
}  # fmt: skip
EVALUATED = ("topk", "jump_relu")


def settings_of(name: str) -> type:
    """The config class of a trainer."""
    return catalog().find("trainer", f"dictionary_learning/{name}").load_config()


def recipe_text(model: Path, text: Path, trainers: dict) -> str:
    """All trainers on one stream; blocks of about five steps; exports to the library's own folder."""
    return json.dumps(
        {
            "saehub": 1,
            "name": "dl",
            "model": {"name": str(model), "device": "cpu", "attention": "eager"},
            "data": {
                "train": {"source": str(text), "tokens": BATCH * STEPS, "context": 32},
                "eval": {"in_sample": {"source": str(text), "split": "all", "tokens": 700}},
            },
            "extract": {"sites": ["resid_post.0"], "lm_batch": 8, "block": 512, "calibration": 512, "normalize": "none", "store": "none"},
            "train": [{"id": name, "uses": f"dictionary_learning/{name}", "seed": SEED, "with": with_} for name, with_ in trainers.items()],
            "evaluate": [{"uses": "dictionary_learning/evaluate", "saes": list(EVALUATED), "with": {"batch": 128, "batch_size": 5}}],
            "export": [{"uses": "dictionary_learning"}],
        }
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The run, killed and resumed; the rows that its trainers got; and what the library makes of them in a process of its own."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("dl")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(400, words=60)))
    model = tiny_model(folder / "model")
    common = {"batch": BATCH, "width": 64}
    trainers = {
        name: {**common, **with_, **({"dead_after": DEAD_AFTER[name]} if name in DEAD_AFTER else {}), **({"normalize_activations": False} if name in RAW else {})}
        for name, with_ in JOBS.items()
    }
    recipe, problems = check_text(recipe_text(model, folder / "text.txt", trainers), "dl.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    plan = make_plan(recipe, catalog(), base=folder / "home")

    patch = pytest.MonkeyPatch()
    seen: dict[int, torch.Tensor] = {}
    calibration: list[torch.Tensor] = []
    workers: list[WorkerProcess] = []
    saved: list[int] = []
    steps, save, start, rows = pipeline_train.Trainee._steps, pipeline_train.Trainee.save, WorkerProcess.__init__, pipeline_train.Trainee._calibration

    def record(self, waiting):
        for offset, batch in enumerate(waiting):
            kept = seen.setdefault(self.step + offset, batch["x"].clone())
            assert torch.equal(kept, batch["x"]), "every job, in both runs, gets the same rows"
        steps(self, waiting)

    def kill(self):
        save(self)
        saved.append(self.step)
        if len(saved) == 3 * len(JOBS):
            os.kill(workers[-1].process.pid, signal.SIGKILL)

    def keep(self, *args):
        start(self, *args)
        workers.append(self)

    def calibrate(self, *args):
        found = rows(self, *args)
        calibration.append(found.x_ND.clone())
        return found

    patch.setattr(pipeline_train.Trainee, "_steps", record)
    patch.setattr(pipeline_train.Trainee, "save", kill)
    patch.setattr(pipeline_train.Trainee, "_calibration", calibrate)
    patch.setattr(WorkerProcess, "__init__", keep)
    loaded = "dictionary_learning" in sys.modules
    try:
        with pytest.raises(SaehubError, match="died"):
            run(plan)
        between = saved[-1]
        events = []
        result = run(make_plan(recipe, catalog(), base=folder / "home"), [events.append])
    finally:
        patch.undo()
    assert 0 < between < STEPS and sorted(seen) == list(range(STEPS))
    assert [worker.plugin for worker in workers] == ["dictionary_learning"] * 2, "one worker a plugin and run, for training, evaluation and exports"
    assert loaded or "dictionary_learning" not in sys.modules, "the library is imported in its worker only"

    spec = {
        "jobs": {
            name: {"seed": SEED, "batch": BATCH, "settings": with_, "normalize": name not in RAW, **({"dead_after": DEAD_AFTER[name]} if name in DEAD_AFTER else {})}
            for name, with_ in JOBS.items()
        },
        "evaluate": {"model": str(model), "batch": 128, "sequences": 5, "saes": EVALUATED},
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    save_file({"x": torch.cat([seen[step] for step in range(STEPS)]), "calibration": calibration[0]}, folder / "rows.safetensors")
    tokens = next(stage.where for stage in plan.stages if stage.id == "tokens/in_sample") / "tokens"
    save_file(dataset_rows(plan, tokens), folder / "dataset.safetensors")
    script = Path(__file__).with_name("dictionary_learning_drives.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    facts = json.loads((folder / "facts.json").read_text())
    return types.SimpleNamespace(folder=folder, plan=plan, result=result, events=events, facts=facts, said=ran.stdout)


def dataset_rows(plan, path: Path) -> dict[str, torch.Tensor]:
    """Kept rows of a dataset at the site, by saehub's own reader, and its tokens."""
    from saehub.activations import taps
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset
    from saehub.sites import Site

    tokens, model = TokenDataset.open(path), ModelHandle.load(plan.model)
    ids_ST = tokens.tokens(0, tokens.n_sequences)
    x_STD = taps.read(model.hf, ids_ST, {"x": Site.parse("resid_post.0").tap(model.shape)})["x"]
    return {"x": x_STD[tokens.keep(0, tokens.n_sequences)].contiguous(), "tokens": ids_ST.contiguous()}


@pytest.mark.parametrize("name", JOBS)
def test_weights_are_those_of_the_library_bit_for_bit_after_a_kill(done, name):
    theirs = load_file(done.folder / f"{name}.safetensors")
    sae = load(done.result.checkpoints[name])
    ours = sae.tensors()
    layout = OURS[sae.config.architecture]
    assert set(layout) == set(ours)
    for mine, their in layout.items():
        wanted = theirs[their.removesuffix(".T")]
        assert torch.equal(ours[mine], wanted.T if their.endswith(".T") else wanted), f"{mine} is not {their}"


def test_what_was_exercised(done):
    assert "resampling" in done.said, "a latent was resampled on the way, so random numbers were drawn after the start"
    assert json.loads((done.result.run_dir / "run_card.json").read_text())["resume"] == "exact"


@pytest.mark.parametrize("name", JOBS)
def test_the_export_is_what_the_library_would_have_saved(done, name):
    exported = done.result.run_dir / "exports" / "dictionary_learning" / name
    theirs, saved = load_file(done.folder / f"{name}.safetensors"), torch.load(exported / "ae.pt", weights_only=True)
    assert saved.keys() == theirs.keys() and all(torch.equal(saved[key], theirs[key]) for key in saved)
    config = json.loads((exported / "config.json").read_text())["trainer"]
    assert config["trainer_class"] == settings_of(name).trainer.partition(":")[2] and config["steps" if "steps" in config else "dict_size"] in (STEPS, 64)
    card = json.loads((done.result.run_dir / "run_card.json").read_text())
    certificate = json.loads((exported / "conversion.json").read_text())
    assert certificate["support"]["unexplained"] == 0 and certificate["reconstruction"]["frobenius"] <= 1e-6
    assert card["exports"][f"dictionary_learning/{name}"]["outcome"] == "verified by the target's library"


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluate_gives_the_librarys_own_numbers(done, name):
    wanted = done.facts["evaluate"][name]
    rows = {row.metric: row for row in done.result.measurements if row.subjects == (name,) and row.dataset == "in_sample"}
    assert set(rows) == set(wanted)
    for metric, value in wanted.items():
        # The library's dictionary and ours multiply in another order: float32, 32 terms, then differences of cross-entropies.
        assert rows[metric].value == pytest.approx(value, rel=1e-4 if metric == "frac_recovered" else 1e-5, abs=1e-6), metric
        assert rows[metric].definition == f"dictionary_learning.{metric}/1"
    assert rows["l0"].stderr is not None and rows["l0"].n == 5 and rows["frac_alive"].note


def test_nnsight_reads_what_saehub_reads(done):
    for family, found in done.facts["extract"].items():
        assert len(found["gaps"]) >= 13 and max(found["gaps"].values()) <= 1e-5, (family, found["gaps"])
        assert found["hooks"] == 0, f"nnsight's hooks are taken off {family} again"


def test_cautions_and_refusals_are_about_what_the_library_does(done):
    """When one of these fails, the library has changed: take the caution or the refusal back."""
    seen = done.facts["defects"]
    assert seen["encoder bias at the start"] > 0.01
    assert seen["jump_relu ignores its seed"] and seen["batch_topk before its threshold is a ReLU"]
    assert seen["Lp with p_end 0"].startswith("ZeroDivisionError")
    assert seen["p_anneal's resampling changes"] == [] and seen["gated_anneal's resampling"] == "TypeError"
    assert seen["AuxK's gradient of latents that are negative everywhere"] == 0.0
    assert seen["matryoshka's loss over the sum of its prefixes'"] == pytest.approx(1 / 4, rel=1e-5)
    below, above = seen["jump_relu's L0 gradient below and above its threshold"]
    assert below == 0.0 and above < 0.0


def test_cautions_are_shown_once_and_kept(done):
    said = [event.data["text"] for event in done.events if event.kind == "warning"]
    bias = [line for line in said if "encoder's bias at PyTorch's random start" in line]
    assert bias == [line for line in bias if line.startswith("standard, standard_april: ")] and len(bias) == 1
    assert sum("one threshold, a moving average since step 10" in line for line in said) == 1
    card = json.loads((done.result.run_dir / "run_card.json").read_text())
    assert set(done.plan.warnings) <= set(card["warnings"])
    provenance = read_header(done.result.checkpoints["jump_relu"])["provenance"]
    assert any("ignores the seed" in line for line in provenance["cautions"])
    made_with = provenance["origin"]["settings"]
    assert made_with["seed"] == SEED and made_with["bandwidth"] == 0.05 and made_with["norm_factor"] > 0
    assert read_header(done.result.checkpoints["topk"])["provenance"]["origin"]["settings"]["norm_factor"] is None


JOB = Job("j", "resid_post.0", None, 32, 32, 100, 64, 6400, 0)


@pytest.mark.quick
def test_defaults_are_the_librarys_and_shrink_with_the_run():
    config, long = settings.BatchTopKConfig(k=4, batch=64), replace(JOB, steps=100_000, rows=6_400_000_000)
    assert config.settings(long) == {"k": 4, "auxk_alpha": 1 / 32, "warmup_steps": 1000, "threshold_start_step": 1000, "threshold_beta": 0.999}
    assert config.attributes(long) == {"dead_feature_threshold": 10_000_000} and not config.scaled(long)
    short = config.settings(JOB)
    assert (short["warmup_steps"], short["threshold_start_step"], short["threshold_beta"]) == (10, 50, pytest.approx(0.8))
    assert config.attributes(JOB) == {"dead_feature_threshold": 512}
    assert "warmup_steps 10 (not 1000)" in next(iter(config.cautions(JOB)))
    shares = settings.StandardConfig(warmup_steps=0.25, decay_start=60, sparsity_warmup_steps=0)
    assert shares.resolved(JOB) == {"warmup_steps": 25, "sparsity_warmup_steps": 0, "decay_start": 60} and not list(shares.check(JOB))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (settings.PAnnealConfig(sparsity_function="Lp"), "the library divides by p"),
        (settings.PAnnealConfig(anneal_end=80), "has no gradient"),
        (settings.PAnnealConfig(resample_steps=10), "changes no weight"),
        (settings.GatedAnnealConfig(resample_steps=10), "fails"),
        (settings.PAnnealConfig(anneal_start=95), "n_sparsity_updates is 10"),
        (settings.StandardConfig(resample_steps=10, decay_start=50), "exclude each other"),
        (settings.StandardConfig(resample_steps=0.001), "at least one step"),
        (settings.StandardConfig(resample_steps=10, warmup_steps=0), "divides by it"),
        (settings.StandardConfig(warmup_steps=100), "below the run's 100"),
        (settings.StandardConfig(warmup_steps=2.5), "whole number"),
        (settings.GatedConfig(decay_start=15), "sparsity_warmup_steps ends at 20"),
        (settings.BatchTopKConfig(k=4, threshold_start_step=99), "never be set"),
        (settings.MatryoshkaBatchTopKConfig(k=4, width=16), "leave a group"),
        (settings.TopKConfig(k=300), "between 1 and the 256 latents"),
    ],
)
def test_what_would_fail_upstream_is_refused_before_work(config, said):
    problems = list(config.check(JOB))
    assert any(said in problem for problem in problems), problems


@pytest.mark.quick
def test_a_library_that_changed_is_refused_with_both_versions(monkeypatch):
    """Simulated: the module is there, the class or what it takes is not."""
    path = settings.TopKConfig.trainer
    fake = types.ModuleType("dictionary_learning.trainers.top_k")
    for name in ("dictionary_learning", "dictionary_learning.trainers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    here = metadata.version("dictionary-learning")
    for attributes, said in (
        ({}, "no 'TopKTrainer'"),
        ({"TopKTrainer": type("TopKTrainer", (), {"config": {}})}, "has no 'update'"),
        ({"TopKTrainer": type("TopKTrainer", (), {"config": {}, "update": None, "__init__": lambda self, steps: None})}, "no longer takes k"),
    ):
        vars(fake).update(attributes)
        with pytest.raises(MissingDependency) as error:
            library.trainer_class(path, {"k": 4, "steps": 1})
        assert said in str(error.value) and f"dictionary-learning {here} is installed; the adapter was written for 0.1.0" in str(error.value)
        assert error.value.fix == "pip install 'dictionary-learning==0.1.0'"
