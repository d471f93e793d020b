"""What users get wrong, through the real command line: each message names the place and the fix, each exit code is the one promised."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """saehub: 1
name: wrong
model: {{name: {model}, device: cpu}}
data:
  train: {{source: {text}, split: all, tokens: 4_000, context: 32, repeat: true}}
extract: {{sites: [resid_post.0], lm_batch: 8, block: 1_024, calibration: 512, store: none}}
train:
  - {{id: a, uses: native/topk, with: {{k: 4, width: 64, batch: 128}}}}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(200, words=60)))
    for name, text in (("empty.txt", ""), ("blank.txt", " \n\n"), ("broken.jsonl", "{\n")):
        (folder / name).write_text(text)
    tiny_model(folder / "model")
    return folder


def write(toy: Path, old: str = "", new: str = "") -> Path:
    text = RECIPE.format(model=toy / "model", text=toy / "text.txt")
    assert old in text, old
    path = toy / "wrong.yaml"
    path.write_text(text.replace(old, new) if old else text)
    return path


def saehub(home: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SAEHUB_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "saehub.cli.main", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


# (what is written, what stands there instead, exit code, words that must appear)
MISTAKES = [
    ("width: 64", "widht: 64", 2, ["wrong.yaml:8:", "widht", "width"]),
    ("k: 4", 'k: "4"', 2, ["wrong.yaml:8:", "train.a.with.k", "whole number"]),
    ("native/topk", "native/topkk", 2, ["wrong.yaml:8:", "native/topk"]),
    ("text.txt", "nowhere.txt", 2, ["wrong.yaml:5:", "nowhere.txt"]),
    ("resid_post.0", "resid_post.9", 2, ["wrong.yaml:6:", "resid_post.9", "2 layers"]),
    ("k: 4", "k: 65", 2, ["wrong.yaml:8:", "65", "64"]),
    ("context: 32", "context: 100_000", 2, ["wrong.yaml:5:", "100000", "context:"]),
    ("saehub: 1", "saehub: 2", 2, ["wrong.yaml:1:", "format"]),
    ("batch: 128", "batch: 9_000", 2, ["wrong.yaml:8:", "4000"]),
    ("text.txt", "empty.txt", 2, ["wrong.yaml:5:", "empty.txt' is empty", "0 bytes"]),
    ("text.txt", "blank.txt", 4, ["blank.txt' holds no text", "blank space", "fix"]),
    ("text.txt", "broken.jsonl", 4, ["broken.jsonl:1 is not JSON", "fix"]),
    ("batch: 128", "batch: 0", 2, ["wrong.yaml:8:", "batch is 0"]),
    ("repeat: true", "repeat: false, tokens: 4_000_000", 2, ["wrong.yaml:5:", "tokens"]),
]


@pytest.mark.parametrize(("old", "new", "code", "words"), MISTAKES, ids=[new for _, new, _, _ in MISTAKES])
def test_mistake(toy, tmp_path, old, new, code, words):
    result = saehub(tmp_path, "recipe", "run", write(toy, old, new))
    told = result.stdout + result.stderr
    assert result.returncode == code, told
    assert "Traceback" not in told
    for word in words:
        assert word in told, f"{word!r} is not in:\n{told}"


def test_too_few_rows_says_how_many_there_are(toy, tmp_path):
    path = write(toy, "tokens: 4_000, context: 32, repeat: true", "tokens: 4_000_000, context: 32")
    result = saehub(tmp_path, "recipe", "run", path)
    assert result.returncode == 4 and "repeat: true" in result.stderr and "available" in result.stderr, result.stderr


def test_a_hub_model_without_the_hub(toy, tmp_path):
    result = saehub(tmp_path, "recipe", "run", "topk-llama-3.1-8b")
    assert result.returncode in (2, 4) and "Traceback" not in result.stderr
    assert "meta-llama/Llama-3.1-8B-Instruct" in result.stderr and "hf " in result.stderr, result.stderr


def test_full_disk_keeps_what_was_finished(toy, tmp_path):
    """A limit on file size stands in for a full disk: the write of a state fails in the middle of training."""
    path = write(toy, "width: 64", "width: 4096")
    limit = 400_000  # bytes: enough for tokens and calibration rows, too little for a state

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = saehub(tmp_path, "recipe", "run", path, preexec_fn=small)
    assert full.returncode == 4, full.stderr
    assert "Traceback" not in full.stderr and "SAEHUB_HOME" in full.stderr and "disk" in full.stderr, full.stderr
    again = saehub(tmp_path, "recipe", "run", path)
    assert again.returncode == 0, again.stderr
    assert "cached" in again.stderr, "the finished tokens must have been kept"


def test_ctrl_c_saves_and_says_so(toy, tmp_path):
    path = write(toy, "tokens: 4_000", "tokens: 3_000_000")
    environment = {**os.environ, "SAEHUB_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "saehub.cli.main", "recipe", "run", str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 200
    while time.time() < deadline and not list((tmp_path / "store").glob("state/*/step-*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "saved" in told and "same command" in told and "Traceback" not in told, told


def test_an_export_that_cannot_work_is_refused_before_training(toy, tmp_path):
    """SAELens has no TopK transcoder: known from the recipe, so nothing is trained first. One line for all that have the reason in common."""
    path = write(toy, "sites: [resid_post.0]", "sites: [resid_post.0, mlp_out.1]")
    placed = path.read_text().replace("{id: a,", "{id: a, site: resid_post.0, target_site: mlp_out.1, sweep: {k: [3, 5]},")
    path.write_text(placed + "export: [{uses: saelens}]\n")
    result = saehub(tmp_path, "recipe", "run", path)
    assert result.returncode == 2, result.stderr
    assert "export/saelens: a-k3, a-k5 will be a topk transcoder" in result.stderr and "nothing was started" in result.stderr
    (fix,) = [line for line in result.stderr.splitlines() if line.strip().startswith("fix:")]
    assert fix.endswith("another format: sparsify/sparsify")  # the others have no such transcoder, or are only read
    assert not list((tmp_path / "store").glob("tokens/*"))


def test_a_home_that_cannot_be_made(toy):
    result = saehub(Path("/proc/nowhere"), "recipe", "run", write(toy))
    assert result.returncode == 4 and "SAEHUB_HOME" in result.stderr and "bug" not in result.stderr, result.stderr
