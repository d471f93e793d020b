"""Whole runs on a tiny model: caching, resume after Ctrl-C, partial failures, several jobs from one pass, folded normalisation."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch

import saehub
from saehub.checkpoint.format import load, read_header
from saehub.errors import Interrupted, SaehubError
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: toy
model: {{name: {model}, device: cpu}}
data:
  train: {{source: {text}, tokens: 6_000, context: 32}}
extract: {{sites: [resid_post.0, mlp_out.1], lm_batch: 8, block: 1_024, calibration: 512, store: none}}
train:
  - {{id: a, uses: native/topk, site: resid_post.0, with: {{k: 4, width: 64, batch: 128}}}}
  - {{id: b, uses: native/topk, site: mlp_out.1, with: {{k: 2, width: 48, batch: 200}}}}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[Path, Path]:
    """A model folder and a text file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("toy")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(200, words=60)))
    return tiny_model(folder / "model"), folder / "text.txt"


def planned(toy, base: Path, edit=lambda text: text):
    recipe, problems = check_text(edit(RECIPE.format(model=toy[0], text=toy[1])), "toy.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    return make_plan(recipe, catalog(), base=base)


def go(toy, base: Path, edit=lambda text: text, listeners=()):
    seen = []
    result = run(planned(toy, base, edit), [seen.append, *listeners])
    return result, seen


def test_second_run_is_cached_and_says_so(toy, tmp_path):
    first, _ = go(toy, tmp_path)
    again, events = go(toy, tmp_path)
    assert first.run_dir == again.run_dir
    kinds = {event.stage: event.kind for event in events if event.kind in ("stage_cached", "stage_finished")}
    assert kinds == dict.fromkeys(["tokens/train", "train/a", "train/b"], "stage_cached")
    for name in ("recipe.yaml", "recipe.lock", "events.jsonl", "results.json", "run_card.json", "run_card.md", "report.html"):
        assert (first.run_dir / name).is_file(), name
    card = json.loads((first.run_dir / "run_card.json").read_text())
    assert card["status"] == "finished" and card["saes"]["a"]["rows"] == 6000 // 128 * 128
    assert set(first.checkpoints) == {"a", "b"}


WRONG = [
    ("open", lambda *_: None, "open of native/topk returned nothing (None)"),
    ("state", lambda self: {"a": 1}, "state of native/topk returned {'a': 1}, a dict"),
    ("step", lambda self, *_: int("x"), "ValueError"),
    ("step", lambda self, *_: exit(3), "SystemExit: 3"),
    ("metrics", lambda self: {"loss": torch.ones(1)}, "metrics of native/topk returned {'loss': tensor([1.])}, a dict"),
    ("metrics", lambda self: {"loss": 10**400}, "metrics of native/topk"),
    ("finish", lambda self: {}, "finish of native/topk returned {}, a dict"),
    ("finish", lambda self: saehub.testing.saes.random_sae("topk", d_in=20), "an SAE of widths 20 -> 20"),
    ("finish", lambda self: int("x"), "ValueError"),
]


@pytest.mark.parametrize(("method", "wrong", "words"), WRONG)
def test_a_trainer_that_breaks_its_promise_is_named_and_takes_no_other_with_it(toy, tmp_path, monkeypatch, method, wrong, words):
    """The first of two jobs misbehaves, wherever it can; the other one is trained, and published."""
    import saehub.testing.saes
    from saehub_native.train import NativeSession, NativeTrainer

    owner = NativeTrainer if method == "open" else NativeSession
    right = getattr(owner, method)

    def call(self, *args):
        job = args[0] if method == "open" else self.job
        return (wrong if job.id == "a" else right)(self, *args)

    monkeypatch.setattr(owner, method, call)
    seen = []
    with pytest.raises(SaehubError) as error:
        run(planned(toy, tmp_path, lambda text: text.replace("6_000", "1_200")), [seen.append])
    assert error.value.exit_code == 4 and words in f"{error.value.what} {error.value.said}" and "a" in f"{error.value.where}{error.value.what}"
    ended = {event.stage: event.kind for event in seen if event.kind in ("stage_failed", "stage_finished") and event.stage.startswith("train/")}
    assert ended == {"train/a": "stage_failed", "train/b": "stage_finished"}


def test_one_knob_reruns_only_what_depends_on_it(toy, tmp_path):
    go(toy, tmp_path)
    _, events = go(toy, tmp_path, lambda text: text.replace("k: 2", "k: 3"))
    kinds = {event.stage: event.kind for event in events if event.kind in ("stage_cached", "stage_finished")}
    assert kinds == {"tokens/train": "stage_cached", "train/a": "stage_cached", "train/b": "stage_finished"}


def test_jobs_do_not_influence_one_another(toy, tmp_path):
    """A job trained beside another equals itself trained alone, bit for bit."""
    together, _ = go(toy, tmp_path / "together")
    alone, _ = go(toy, tmp_path / "alone", lambda text: "\n".join(line for line in text.splitlines() if "id: a" not in line))
    both, one = load(together.checkpoints["b"]).tensors(), load(alone.checkpoints["b"]).tensors()
    assert all(torch.equal(both[name], one[name]) for name in one)


def test_normalisation_is_folded(toy, tmp_path):
    """The checkpoint takes raw rows: its reconstruction of them is as good as the trainer's own last word on scaled rows."""
    result, _ = go(toy, tmp_path)
    header = read_header(result.checkpoints["a"])
    assert header["provenance"]["trainer"]["scale"] != 1.0
    from safetensors.torch import load_file

    raw = load_file(result.checkpoints["a"] / "probe.safetensors")
    x = next(tensor for name, tensor in raw.items() if tensor.ndim == 2 and tensor.shape[1] == 32 and name.startswith("x")).float()
    sae = load(result.checkpoints["a"])
    fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    card = json.loads((result.run_dir / "run_card.json").read_text())
    assert fvu < 1.3 * card["saes"]["a"]["last_metrics"]["fvu"] + 0.05, fvu


def test_interrupt_saves_and_resumes_exactly(toy, tmp_path):
    straight, _ = go(toy, tmp_path / "straight")
    steps = []

    def stop(event):
        if event.kind == "progress" and event.stage == "train/b":
            steps.append(event.data["done"])
            if len(steps) == 1:
                signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted) as stopped:
        go(toy, tmp_path / "stopped", listeners=[stop])
    assert stopped.value.exit_code == 130 and "same command" in stopped.value.fix
    assert f"b at step {steps[0]} of" in stopped.value.where
    plan = planned(toy, tmp_path / "stopped")
    assert plan.stage("train/b").detail["resume_step"] == steps[0]
    assert plan.stage("train/b").partial and plan.stage("tokens/train").cached
    resumed, events = go(toy, tmp_path / "stopped")
    assert any("going on from step" in event.data.get("text", "") for event in events)
    for name in ("a", "b"):
        before, after = load(straight.checkpoints[name]).tensors(), load(resumed.checkpoints[name]).tensors()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert json.loads((resumed.run_dir / "run_card.json").read_text())["resume"] == "exact"


def test_resume_under_other_conditions_is_called_inexact(toy, tmp_path, monkeypatch):
    def stop(event):
        if event.kind == "progress" and event.stage == "train/b":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        go(toy, tmp_path, listeners=[stop])
    torch.set_num_threads(2)
    try:
        result, events = go(toy, tmp_path)
    finally:
        torch.set_num_threads(1)
    card = json.loads((result.run_dir / "run_card.json").read_text())
    assert card["resume"] == "inexact" and any("threads" in change for change in card["resume_changes"])
    assert any(event.kind == "warning" and "inexact" in event.data["text"] for event in events)


def test_a_failed_job_leaves_the_others_finished(toy, tmp_path, monkeypatch):
    from saehub_native.train import NativeSession

    step = NativeSession.step

    def poisoned(self, x, y=None):
        step(self, x * float("nan") if self.job.id == "a" and self.steps_done == 5 else x, y)

    monkeypatch.setattr(NativeSession, "step", poisoned)
    with pytest.raises(SaehubError) as failure:
        go(toy, tmp_path)
    assert "loss of a" in failure.value.what and failure.value.fix
    plan = planned(toy, tmp_path)
    assert plan.stage("train/b").cached and not plan.stage("train/a").cached
    card = json.loads((plan.run_dir / "run_card.json").read_text())
    assert card["status"] == "failed" and set(card["saes"]) == {"b"}
    monkeypatch.undo()
    again, _ = go(toy, tmp_path)
    assert set(again.checkpoints) == {"a", "b"}


def test_nan_activations_name_the_site(toy, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(toy[0]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SaehubError) as failure:
        go((broken, toy[1]), tmp_path / "home")
    assert "mlp_out.1" in str(failure.value) and failure.value.fix and failure.value.exit_code == 4


def test_published_saes_join_in(toy, tmp_path):
    """`saes:` brings a checkpoint in; its site comes from the checkpoint."""
    trained, _ = go(toy, tmp_path)

    def only_load(text):
        return text.split("train:\n  -")[0] + f"saes: [{{id: old, load: {trained.checkpoints['a']}}}]\n"

    result, _ = go(toy, tmp_path, only_load)
    assert set(result.checkpoints) == {"old"}
    assert torch.equal(load(result.checkpoints["old"]).W_enc, load(trained.checkpoints["a"]).W_enc)


def test_python_entry_point(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEHUB_HOME", str(tmp_path / "home"))
    (tmp_path / "toy.yaml").write_text(RECIPE.format(model=toy[0], text=toy[1]))
    result = saehub.run(tmp_path / "toy.yaml", set={"train.a.with.k": 3})
    assert load(result.checkpoints["a"]).config.params["k"] == 3 and str(result.run_dir).startswith(str(tmp_path / "home"))


def test_eval_of_a_checkpoint_measures_what_the_recipe_measured(toy, tmp_path, monkeypatch):
    """`saehub eval CKPT --with native/core`, as a user types it, on text and model that the checkpoint names itself."""
    from click.testing import CliRunner

    from saehub.cli.main import cli

    documents = tmp_path / "documents.jsonl"  # enough of them that some are held out
    documents.write_text("\n".join(json.dumps({"text": text}) for text in tiny_text(200, words=60)))

    def evaluated(text: str) -> str:
        text = text.replace(str(toy[1]), str(documents))
        text = text.replace("\nextract:", f"\n  eval: {{in_sample: {{source: {documents}, split: heldout, tokens: 900}}}}\nextract:")
        return text + "evaluate: [{uses: native/core, saes: [a]}]\n"

    result, _ = go(toy, tmp_path / "recipe", evaluated)
    monkeypatch.setenv("SAEHUB_HOME", str(tmp_path / "eval"))
    command = ["eval", str(result.checkpoints["a"]), "--with", "native/core", "--tokens", "900", "--json"]
    said = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    rows = [row for row in json.loads(said.stdout)["measurements"] if row["status"] == "ok"]
    expected = {row["metric"]: row["value"] for row in result.results if row["status"] == "ok"}
    found = {row["metric"]: row["value"] for row in rows}
    assert found["fvu"] == pytest.approx(expected["fvu"], rel=1e-6) and found["ce_recovered_zero"] == pytest.approx(expected["ce_recovered_zero"], rel=1e-6)
    assert set(found) == set(expected)
