"""Many SAEs from one pass: each is what it would be alone, in another company or in a pass of its own; a NaN takes only its own job along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.api import Job
from saehub.errors import StageFailed
from saehub.pipeline import passes
from saehub.pipeline.plan import Stage, make_plan
from saehub.pipeline.resume import load_state
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text

HEAD = """
saehub: 1
name: many
data: {{train: {{source: builtin/python-docs, tokens: 2_400}}}}
extract: {{uses: native/files, sites: [resid_post.0, mlp_out.0], with: {{path: {path}}}, store: none, block: 512, calibration: 512}}
train:
"""
# Two sites, five architectures, two widths, two k and two seeds, an autoencoder, a transcoder and a skip transcoder.
JOBS = {
    "topk": "{id: topk, uses: native/topk, site: resid_post.0, with: {width: 64, batch: 128}, sweep: {k: [4, 6], seed: [0, 1]}}",
    "wide": "{id: wide, uses: native/batchtopk, site: mlp_out.0, with: {k: 4, width: 100, batch: 96}}",
    "across": "{id: across, uses: native/jumprelu, site: resid_post.0, target_site: mlp_out.0, with: {target_l0: 5, width: 64, batch: 128}}",
    "skip": "{id: skip, uses: native/matryoshka_batchtopk, site: resid_post.0, target_site: mlp_out.0, with: {k: 4, width: 64, batch: 128, skip: true}}",
    "muon": "{id: muon, uses: native/relu, site: mlp_out.0, with: {target_l0: 5, width: 64, batch: 128, optimizer: muon, resample: 2}}",
}
IDS = ["topk-k4-seed0", "topk-k4-seed1", "topk-k6-seed0", "topk-k6-seed1", "wide", "across", "skip", "muon"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """3,000 rows at two sites, the second a function of the first."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(100, 30, 40, generator=g) * (torch.rand(100, 30, 40, generator=g) < 0.1)
    x = 3 * codes @ torch.randn(40, 16, generator=g) + 0.1 * torch.randn(100, 30, 16, generator=g)
    folder = tmp_path_factory.mktemp("rows")
    save_file({"resid_post.0": x, "mlp_out.0": (x @ torch.randn(16, 12, generator=g)).relu()}, folder / "rows.safetensors")
    return folder


def planned(rows: Path, base: Path, jobs: dict[str, str]):
    recipe, problems = check_text(HEAD.format(path=rows) + "".join(f"  - {text}\n" for text in jobs.values()), "many.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    return make_plan(recipe, catalog(), base=base)


def checkpoints(result) -> dict[str, dict[str, bytes]]:
    """id -> tensor -> bytes."""
    return {
        name: {key: t.reshape(-1).view(torch.uint8).numpy().tobytes() for key, t in load_file(path / "sae.safetensors").items()}
        for name, path in result.checkpoints.items()
    }


@pytest.fixture(scope="module")
def together(rows, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """All of them from one pass."""
    plan = planned(rows, tmp_path_factory.mktemp("together"), JOBS)
    assert plan.totals["passes"] == [[f"train/{name}" for name in IDS]] and not plan.warnings
    return checkpoints(run(plan))


def test_each_job_is_what_it_is_alone(rows, tmp_path, together):
    assert set(together) == set(IDS)
    for name, job in JOBS.items():
        for sae, tensors in checkpoints(run(planned(rows, tmp_path / name, {name: job}))).items():
            assert tensors == together[sae], f"{sae} depends on what is trained beside it"


def test_jobs_that_do_not_fit_are_split_into_passes_which_change_nothing(rows, tmp_path, together, monkeypatch):
    need = {stage.id: stage.detail["memory"] for stage in planned(rows, tmp_path, JOBS).of("train")}
    monkeypatch.setattr("saehub.pipeline.passes.budget", lambda *arguments, **options: 3 * max(need.values()))
    plan = planned(rows, tmp_path, JOBS)
    parts = plan.totals["passes"]
    assert len(parts) >= 2 and [name for part in parts for name in part] == [f"train/{name}" for name in IDS]
    assert all(sum(need[name] for name in part) <= 3 * max(need.values()) for part in parts)
    assert plan.totals["train_memory"] == max(sum(need[name] for name in part) for part in parts)
    assert any(f"{len(parts)} passes" in text for text in plan.warnings)
    assert checkpoints(run(plan)) == together


def test_a_job_larger_than_the_memory_is_named_and_left_to_try(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("saehub.pipeline.estimate.host_memory", lambda: 1_000_000)
    plan = planned(rows, tmp_path, {"wide": JOBS["wide"], "muon": JOBS["muon"]})
    assert plan.totals["passes"] == [["train/wide"], ["train/muon"]]
    assert any(text.startswith("train/wide needs about") and "may not fit" in text for text in plan.warnings)


def stage(name: str, memory: int) -> Stage:
    """A training that needs so much."""
    return Stage(f"train/{name}", "train", name, Path(), detail={"memory": memory}, spec={"job": Job})


@pytest.mark.quick
def test_splitting():
    stages = [stage(name, need) for name, need in zip("abcde", (4, 4, 9, 1, 1), strict=True)]
    assert ["".join(s.key for s in part) for part in passes.split(stages, 10)] == ["ab", "cd", "e"]
    assert ["".join(s.key for s in part) for part in passes.split(stages, 3)] == ["a", "b", "c", "de"]
    assert len(passes.split(stages, None)) == 1 and passes.split([], 10) == []


def test_a_job_whose_loss_is_nan_stops_alone_and_keeps_its_last_good_state(rows, tmp_path, monkeypatch, together):
    from saehub_native.train import NativeSession

    step = NativeSession.step

    def poisoned(self, x_BD, y_BD=None):
        if self.job.id == "wide" and self.steps_done == 9:
            x_BD = x_BD * float("nan")
        step(self, x_BD, y_BD)

    jobs = {name: JOBS[name] for name in ("wide", "across")}
    plan = planned(rows, tmp_path, jobs)
    monkeypatch.setattr(NativeSession, "step", poisoned)
    with pytest.raises(StageFailed, match="loss of wide is nan at step 10"):
        run(plan)
    made = plan.run_dir / "checkpoints"
    assert {path.name for path in made.iterdir()} == {"across"}, "the other job ends as if nothing had happened"
    state, skipped = load_state(plan.store.state_path(plan.stage("train/wide").key))
    assert not skipped and 0 < state.step <= 9
    assert all(bool(t.isfinite().all()) for t in state.tensors.values() if t.is_floating_point())
    monkeypatch.setattr(NativeSession, "step", step)
    assert checkpoints(run(planned(rows, tmp_path, jobs)))["wide"] == together["wide"], "from the last good state it ends where it would have"
