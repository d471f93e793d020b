"""kill -9 on every path: all native architectures × kernels × optimizers in one pass end with the bits of the uninterrupted run.

The 36 jobs pair every architecture with every ranking product and plain torch, and each of those with every optimizer; `-m full` trains all 144.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ARCHITECTURES = {  # component, and what keeps its own state busy: dead latents, a changing k, steered penalties, latents drawn anew
    "topk": ("topk", "k: 2, k_anneal: 0.5, k_aux: 4"),
    "batchtopk": ("batchtopk", "k: 2, k_aux: 4"),
    "matryoshka": ("matryoshka_batchtopk", "k: 2, k_aux: 4, resample: 1"),
    "abstopk": ("abstopk", "k: 2, k_aux: 4"),
    "groupmax": ("groupmax", "k: 2, k_aux: 4, resample: 2"),
    "jumptanh": ("jumprelu", "target_l0: 4"),
    "jumpl0": ("jumprelu", "target_l0: 4, penalty: l0, resample: 1"),
    "relu": ("relu", "target_l0: 4"),
    "gated": ("gated", "target_l0: 4"),
}
SPARSE = tuple(ARCHITECTURES)[:5]
KERNELS = ("int8", "bfloat16", "float32", "reference")
OPTIMIZERS = {"adam": "optimizer: adam", "adam8": "adam_bits: 8", "muon": "optimizer: muon", "free": "optimizer: schedule_free"}
STEPS, BATCH = 16, 128
RECIPE = f"""
saehub: 1
name: paths
model: {{name: builtin/tiny-llama, device: cpu}}
data: {{train: {{source: text.jsonl, tokens: {STEPS * BATCH}, context: 64}}}}
extract: {{sites: [resid_post.0], store: none, block: 700, lm_batch: 8, calibration: 300}}
train:
"""


def recipe(every: bool) -> str:
    """All jobs: each (architecture, kernels) once with an optimizer that goes round, or all three with each other."""
    lines = []
    for i, (name, (component, settings)) in enumerate(ARCHITECTURES.items()):
        for j, kernels in enumerate(KERNELS):
            for n, (word, optimizer) in enumerate(OPTIMIZERS.items()):
                if every or n == (i + j) % len(OPTIMIZERS):
                    more = f"{settings}, width: 96, batch: {BATCH}, calibration: 300, dead_after: {2 * BATCH}, {optimizer}"
                    lines.append(f"  - {{id: {name}-{word}-{kernels}, uses: native/{component}, with: {{{more}}}}}")
    return RECIPE + "\n".join(lines) + "\n"


def run(tmp: Path, home: str, moment: str = "never", at: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SAEHUB_HOME": str(tmp / home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    driver = Path(__file__).with_name("kill_driver.py")
    arguments = [sys.executable, str(driver), str(tmp / "paths.yaml"), moment, str(at), str(tmp / f"{home}-states")]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=1500, cwd=tmp)


def results(tmp: Path, home: str) -> dict[str, dict]:
    """By job: every tensor of the checkpoint and of the last state as bytes, the numbers of that state, the metrics, the checkpoint's header."""
    found = {}
    for manifest in sorted((tmp / home / "store" / "train").glob("*/manifest.json")):
        facts, folder = json.loads(manifest.read_text()), manifest.parent
        last = max((tmp / f"{home}-states" / folder.name).glob("step-*"))
        tensors = {}
        for file in (*folder.glob("checkpoint/*.safetensors"), last / "state.safetensors"):
            for name, tensor in load_file(file).items():
                tensors[f"{file.name}:{name}"] = (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).numpy().tobytes())
        state = json.loads((last / "state.json").read_text())
        header = json.loads((folder / "checkpoint" / "saehub.json").read_text())
        found[facts["job"]["id"]] = {"tensors": tensors, "state": (state["step"], state["data"]), "metrics": facts["metrics"], "header": header}
    return found


def write_inputs(tmp: Path, every: bool) -> int:
    """The recipe and its text; the number of jobs."""
    draw, words = random.Random(1), "the of and to a in is that for it as was with be by on not he his but at are this have".split()
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(20, 90)))}) for _ in range(160)]
    (tmp / "text.jsonl").write_text("\n".join(lines) + "\n")
    (tmp / "paths.yaml").write_text(recipe(every))
    return recipe(every).count("- {id:")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["pairs", "product"])
def test_bits_after_three_kills_are_those_of_the_uninterrupted_run(tmp_path, every):
    jobs, draw = write_inputs(tmp_path, every), random.Random(20)
    straight = run(tmp_path, "straight")
    assert straight.returncode == 0, straight.stderr[-3000:]

    # Blocks of 700 rows: 5 steps, 5 and 6. Wherever the draw puts them, the first moment lies behind the first states, the last before the end.
    moments = [
        ("inside a step", draw.randint(5 * jobs + 1, 10 * jobs - 1)),
        ("inside a block", draw.randint(jobs // 2, 4 * jobs)),
        ("while state is being written", draw.randint(1, jobs // 4)),
    ]
    for moment, at in moments:
        killed = run(tmp_path, "killed", moment, at)
        assert killed.returncode == -9, f"{moment} {at}: {killed.returncode}\n{killed.stderr[-3000:]}"
    resumed = run(tmp_path, "killed")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    (card,) = (tmp_path / "killed" / "runs").glob("*/run_card.json")
    assert json.loads(card.read_text())["resume"] == "exact"

    expected, found = results(tmp_path, "straight"), results(tmp_path, "killed")
    assert len(expected) == jobs and found.keys() == expected.keys()
    for job, before in expected.items():
        after = found[job]
        assert before["tensors"].keys() == after["tensors"].keys(), job
        assert not [name for name, value in before["tensors"].items() if after["tensors"][name] != value], job
        for name in ("state", "metrics", "header"):
            assert before[name] == after[name], (job, name)

    # What would make this prove too little: another path than the one named, or nothing dead to revive.
    for job, row in expected.items():
        name, _, kernels = job.split("-")
        data = row["state"][1]
        assert data["kernels"] == ("reference" if kernels == "reference" else "cpu") and data["kernel_state"].get("rank", "reference") == kernels
        assert name not in SPARSE or row["metrics"]["dead"] > 0.05, (job, row["metrics"])
    with_companion = {job.split("-")[0] for job, row in expected.items() if "companion" in row["state"][1]["kernel_state"]}
    assert with_companion == set(SPARSE)
