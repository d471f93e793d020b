"""kill -9 at six moments, then the same command: final tensors and optimizer state are bit-identical to the uninterrupted run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPE = """
saehub: 1
name: killed
model: {name: builtin/tiny-llama, device: cpu}
data: {train: {source: builtin/python-code, tokens: 20_000, context: 64}}
extract: {sites: [resid_post.0, mlp_out.1], store: none, block: 6_000, lm_batch: 8, calibration: 1_000}
train:
  - {id: a, uses: native/topk, site: resid_post.0, with: {k: 8, width: 256, batch: 512}}
  - {id: b, uses: native/topk, site: mlp_out.1, with: {k: 4, width: 200, batch: 300}}
  - {id: c, uses: native/matryoshka_batchtopk, site: resid_post.0, target_site: mlp_out.1, with: {k: 4, width: 128, batch: 512, skip: true}}
  - {id: d, uses: native/jumprelu, site: mlp_out.1, with: {target_l0: 4, width: 128, batch: 512, resample: 2, optimizer: muon}}
"""
# (moment, at which call, inside a block?)
MOMENTS = [
    ("inside a block", 3),
    ("inside a block", 40),
    ("while extracting", 15),
    ("while state is being written", 2),
    ("between state and rename", 2),
    ("while publishing", 1),
]


def command(tmp: Path, home: str, moment: str, at: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SAEHUB_HOME": str(tmp / home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    driver = Path(__file__).with_name("kill_driver.py")
    arguments = [sys.executable, str(driver), str(tmp / "killed.yaml"), moment, str(at), str(tmp / f"{home}-states")]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp)


def results(tmp: Path, home: str) -> dict[str, bytes]:
    """Every tensor of the final checkpoints and of the last saved states (optimizer moments included), by name, as bytes."""
    found = {}
    for pattern, root in (("runs/*/checkpoints/*/*.safetensors", tmp / home), ("*/step-*/state.safetensors", tmp / f"{home}-states")):
        for file in sorted(root.glob(pattern)):
            for name, tensor in load_file(file).items():
                found[f"{file.relative_to(root).as_posix()}:{name}"] = (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).numpy().tobytes())
    return found


def header(home: Path, job: str) -> dict:
    """A checkpoint's saehub.json."""
    (file,) = home.glob(f"runs/*/checkpoints/{job}/saehub.json")
    return json.loads(file.read_text())


def test_kill_nine_at_six_moments(tmp_path):
    (tmp_path / "killed.yaml").write_text(RECIPE)
    straight = command(tmp_path, "straight", "never", 0)
    assert straight.returncode == 0, straight.stderr[-3000:]
    for moment, at in MOMENTS:
        killed = command(tmp_path, "killed", moment, at)
        assert killed.returncode == -9, f"{moment}: {killed.returncode}\n{killed.stderr[-3000:]}"
    resumed = command(tmp_path, "killed", "never", 0)
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    expected, found = results(tmp_path, "straight"), results(tmp_path, "killed")
    checkpoints = {name.split(":")[0] for name in expected if "/checkpoints/" in name}
    assert len(checkpoints) == 8, "four jobs, each with weights and a golden probe"
    assert any("state/" in name and "m" in name.split("/")[-1] for name in expected), "the comparison must include optimizer state"
    last = {name for name in expected if "step-" not in name}
    newest = {job: max(n for n in expected if n.startswith(job)).split("/")[1] for job in {n.split("/")[0] for n in expected if "step-" in n}}
    last |= {name for name in expected if "step-" in name and name.split("/")[1] == newest[name.split("/")[0]]}
    assert last <= set(found), sorted(last - set(found))[:5]
    different = [name for name in last if expected[name] != found[name]]
    assert not different, different
    headers = [{job: header(tmp_path / home, job) for job in "abcd"} for home in ("straight", "killed")]
    assert headers[0] == headers[1], "provenance, stream hash included, must not tell the two apart"


@pytest.mark.parametrize("store", ["disk", "auto"])
def test_store_does_not_change_the_result(tmp_path, store):
    """Blocks from disk (kept, or spooled) give the bytes that streaming gives."""
    (tmp_path / "killed.yaml").write_text(RECIPE)
    assert command(tmp_path, "none", "never", 0).returncode == 0
    (tmp_path / "killed.yaml").write_text(RECIPE.replace("store: none", f"store: {store}"))
    run = command(tmp_path, store, "never", 0)
    assert run.returncode == 0, run.stderr[-3000:]
    streamed = {name.split("checkpoints/")[1]: value for name, value in results(tmp_path, "none").items() if "checkpoints/" in name}
    stored = {name.split("checkpoints/")[1]: value for name, value in results(tmp_path, store).items() if "checkpoints/" in name}
    assert streamed == stored
    shards = list((tmp_path / store / "store" / "activations").rglob("*.safetensors"))
    assert bool(shards) == (store == "disk"), "a spool must let its blocks go, a store must keep them"
