"""Sparsify's Trainer on a language model, driven by Sparsify, against saehub's sessions on the same rows: the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.api import CalibrationRows, Job
from saehub.checkpoint.load import load
from saehub.pipeline.components import Components
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run as run_plan
from saehub.plugins import catalog
from saehub.recipe.check import check, make_config
from saehub.testing.stage import Stage
from saehub.testing.toys import tiny_text

SCRIPT = Path(__file__).with_name("sparsify_trains.py")
theirs = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
BATCH = theirs.SEQUENCES * theirs.LENGTH
WORDS = {"lr_warmup_steps": "warmup", "dead_feature_threshold": "dead_after"}
CASES = [(run, point, seed) for run, (_, points, settings) in theirs.RUNS.items() for point in points for seed in settings.get("init_seeds", [0])]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """A tiny Llama and its text."""
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def sequences(stage):
    """Sequences of 16 tokens."""
    return stage.tokens(rows=800)


@pytest.fixture(scope="module")
def made(tmp_path_factory, stage, sequences) -> Path:
    """The library's runs."""
    folder = tmp_path_factory.mktemp("sparsify-trains")
    first = sequences.calibration_sequences
    ids = sequences.tokens(first, first + theirs.STEPS * theirs.SEQUENCES)
    save_file({"ids": ids, "exclude": torch.tensor(sequences.manifest["exclude_ids"])}, folder / "tokens.safetensors")
    words = [sys.executable, str(SCRIPT), str(folder), stage.spec.name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def components() -> Iterator[Components]:
    """One worker for the module."""
    with Components() as workers:
        yield workers


class Ours:
    """One run's job, rows and sessions."""

    def __init__(self, components: Components, made: Path, run: str, point: str, seed: int):
        coder, _, settings = theirs.RUNS[run]
        name = run.partition(" ")[0] if " " in run and run.partition(" ")[0] in ("groupmax", "multi_topk", "transcoder", "skip_transcoder") else "topk"
        with_ = {WORDS.get(word, word): value for word, value in settings.items() if word != "init_seeds"}
        with_ |= {"batch": BATCH, "width": theirs.LATENTS, "k": theirs.K} | {key: value for key, value in coder.items() if key == "normalize_decoder"}
        self.registered = catalog().find("trainer", f"sparsify/{name}")
        self.config = make_config(self.registered, with_)
        self.components = components
        rows = load_file(made / run / "rows.safetensors")
        self.x, self.y = rows[f"x {point}"], rows.get(f"y {point}")
        target = "mlp_out.1" if self.y is not None else None
        self.job = Job(run, "resid_post.1", target, theirs.D, theirs.D, theirs.STEPS, BATCH, theirs.STEPS * BATCH, seed)
        several = "init_seeds" in settings
        at = f"{point}/seed{seed}" if several else point
        self.saved = load_file(made / run / at / "sae.safetensors")
        self.features = load_file(made / run / "features.safetensors")[at]

    def open(self):
        """A session in the worker."""
        return self.components.make(self.registered, self.config).open(self.job, CalibrationRows(torch.zeros(4, theirs.D)))

    def steps(self, session, start: int, end: int) -> dict:
        """Steps start … end, in one message."""
        y_ND = None if self.y is None else self.y[start:end].flatten(0, 1)
        return session.steps(self.x[start:end].flatten(0, 1), y_ND, BATCH)


def stored(sae) -> dict[str, torch.Tensor]:
    """Our tensors under the library's names."""
    t = sae.tensors()
    return {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], **{name: t[name] for name in ("W_dec", "b_dec", "W_skip") if name in t}}


@pytest.mark.parametrize(("run", "point", "seed"), CASES)
def test_weights_are_those_of_the_library_also_after_a_stop(run, point, seed, made, components):
    """Bit for bit, for every trainer and optimizer; several hookpoints and seeds of one upstream Trainer are as many jobs of ours."""
    ours = Ours(components, made, run, point, seed)
    session = ours.open()
    ours.steps(session, 0, 5)
    tensors, data = session.state()
    metrics = ours.steps(session, 5, theirs.STEPS)
    sae = session.finish()
    found = stored(sae)
    assert set(found) == set(ours.saved)
    for name, expected in ours.saved.items():
        assert torch.equal(found[name], expected), f"{name} differs by {(found[name] - expected).abs().max():.3g}"
    assert 0 < metrics["l0"] <= theirs.K and metrics["fvu"] > 0 and metrics["lr"] > 0

    resumed = ours.open()
    resumed.load_state(tensors, data)
    ours.steps(resumed, 5, theirs.STEPS)
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored(resumed.finish()).items()), "not bit-identical after a stop at step 5"

    f_NF = sae.encode(ours.x[-1])
    assert torch.equal(f_NF != 0, ours.features != 0)
    torch.testing.assert_close(f_NF, ours.features, rtol=1e-5, atol=1e-6)
    assert sae.provenance["origin"]["config"]["k"] == theirs.K


END_TO_END = {
    "kl": (("resid_post.0", None), {"optimizer": "adam", "lr": 3e-3, "warmup": 2}),
    "ce": (("resid_post.0", None), {"activation": "groupmax", "loss": "ce"}),
    "ce transcoder": (("mlp_in.1", "mlp_out.1"), {"optimizer": "adam", "lr": 3e-3, "warmup": 2, "loss": "ce", "skip_connection": True}),
}


@pytest.mark.parametrize("run", END_TO_END)
def test_end_to_end_weights_are_those_of_the_library(run, made, components, stage, sequences):
    (site, target), with_ = END_TO_END[run]
    registered = catalog().find("trainer", "sparsify/end_to_end")
    config = make_config(registered, {"batch": BATCH, "width": theirs.LATENTS, "k": theirs.K, **with_})
    job = Job(run, site, target, 32, 32, theirs.STEPS, BATCH, theirs.STEPS * BATCH, 0)
    session = components.make(registered, config).open(job, stage.model, sequences)
    for step in range(theirs.STEPS):
        session.advance()
        if step == 4:
            tensors, data = session.state()
    expected = load_file(made / run / theirs.END_TO_END[run][1] / "sae.safetensors")
    found = stored(session.finish())
    assert all(torch.equal(found[name], expected[name]) for name in expected) and set(found) == set(expected)
    assert session.metrics()["loss"] > 0

    resumed = components.make(registered, config).open(job, stage.model, sequences)
    resumed.load_state(tensors, data)
    for _ in range(5, theirs.STEPS):
        resumed.advance()
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored(resumed.finish()).items())


def test_what_the_cautions_say_is_so(made):
    """Gradients of the library itself; when one of these fails, the library has changed and the caution goes."""
    found = json.loads((made / "facts.json").read_text())["gradients"]
    assert found["auxk"] == 0 and found["multi_topk"] == 0, "the encoder gets no gradient from either"
    assert found["auxk decoder"] > 0 and found["multi_topk decoder"] > 0
    assert found["inactive"] > 0, "latents selected at zero are trained"


def test_a_session_leaves_its_surroundings_alone(made):
    """Random states, gradient mode, precision and environment (`world_unchanged` in the script), inputs; no wandb, no files."""
    facts = json.loads((made / "facts.json").read_text())["isolation"]
    assert facts == {"precision": "highest", "inputs": True, "wandb": False, "written": []}


RECIPE = """
saehub: 1
name: killed
model: {{name: {model}, device: cpu}}
data: {{train: {{source: {text}, tokens: 4_000, context: 32}}}}
extract: {{sites: [resid_post.0, mlp_in.1, mlp_out.1], store: none, block: 1_000, lm_batch: 8, calibration: 200}}
train:
  - {{id: signum, uses: sparsify/topk, site: resid_post.0, with: {{k: 4, width: 64, batch: 100}}}}
  - {{id: adam, uses: sparsify/topk, site: mlp_out.1, seed: 5, with: {{k: 4, width: 64, batch: 90, optimizer: adam, k_decay_steps: 20}}}}
  - {{id: muon, uses: sparsify/multi_topk, site: resid_post.0, with: {{k: 4, width: 64, batch: 100, optimizer: muon}}}}
  - {{id: skip, uses: sparsify/skip_transcoder, site: mlp_in.1, target_site: mlp_out.1, with: {{k: 4, width: 64, batch: 100}}}}
"""


def test_kill_nine_and_resume_is_bit_identical(tmp_path, stage, components, monkeypatch):
    """The hub dies with its worker while a state is written; the same command ends as the uninterrupted run, for every optimizer."""
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_text(160)))
    path = tmp_path / "killed.yaml"
    path.write_text(RECIPE.format(model=stage.spec.name, text=tmp_path / "text.txt"))
    # The runs of this process share the worker that is there: importing the library takes longer than they do.
    lent = SimpleNamespace(make=components.make, close=lambda: None)
    monkeypatch.setattr("saehub.pipeline.context.Components", lambda log_dir=None: lent)
    recipe, problems = check(path, (), catalog())
    assert not [problem for problem in problems if problem.severity == "error"], problems
    planned = make_plan(recipe, catalog(), base=tmp_path / "straight")
    assert any("muon: sparsify's multi-topk loss gives the encoder no gradient" in text for text in planned.warnings)
    straight = run_plan(planned)

    driver = Path(__file__).parents[1] / "pipeline" / "kill_driver.py"
    environment = {**os.environ, "SAEHUB_HOME": str(tmp_path / "killed"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(driver), str(path), "between state and rename", "7", str(tmp_path / "states")]
    killed = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
    assert killed.returncode == -9, killed.stderr[-3000:]
    said = []
    resumed = run_plan(make_plan(recipe, catalog(), base=tmp_path / "killed"), [said.append])
    assert sum("going on from step" in str(event.data.get("text")) for event in said if event.kind == "log") == 4
    assert json.loads((resumed.run_dir / "run_card.json").read_text())["resume"] == "exact"
    for job in ("signum", "adam", "muon", "skip"):
        one, other = (load_file(result.checkpoints[job] / "sae.safetensors") for result in (straight, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one), job
    assert load(resumed.checkpoints["muon"]).provenance["cautions"][1].startswith("sparsify's multi-topk loss")
