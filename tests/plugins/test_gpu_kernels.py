"""The Triton kernels in; proof that they compute what plain torch and float64 do, and compile for a GPU that need not be there, out.

Each in a process of its own: Triton's interpreter is switched on before Triton is imported, and compiling needs it off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(path: Path, *words: str, **environment: str) -> dict:
    """The script's report."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SAEHUB_KERNELS", "CUDA_VISIBLE_DEVICES")}
    command = [sys.executable, str(SCRIPT), *words, "--json", str(path)]
    done = subprocess.run(command, env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True, timeout=1500, check=False)
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> dict[str, dict]:
    """What `gpu.py --check` found, by name; torch resolves triton where its wheel depends on it (Linux)."""
    assert find_spec("triton"), "torch's Linux wheels bring triton"
    report = run(tmp_path_factory.mktemp("gpu") / "checks.json", "--check", TRITON_INTERPRET="1")
    return {row["what"]: row for row in report["checks"]}


@pytest.mark.parametrize("kernel", ["encode", "threshold", "gather", "refine", "select", "reconstruct", "latents", "update", "training"])
def test_right_in_the_interpreter(checks, kernel):
    rows = [row for what, row in checks.items() if what.split(":")[0].split(",")[0] == kernel]
    assert rows and all(row["ok"] for row in rows), rows


def test_every_kernel_compiles_for_compute_capability_9(tmp_path):
    compiled = run(tmp_path / "compiled.json", "--compile")["compiled"]
    assert {row["kernel"] for row in compiled} == {"encode", "threshold", "gather", "refine", "reconstruct", "latents"}
    assert all(row["bytes"] > 1000 and row["shared"] < 227 * 1024 for row in compiled)  # what a block can have on that device


@pytest.mark.quick
def test_they_are_not_chosen_by_themselves(monkeypatch):
    """Not measured on a GPU yet: plain torch runs there unless SAEHUB_KERNELS=gpu asks for them."""
    from saehub.errors import StageFailed
    from saehub_native.kernels import pick

    monkeypatch.delenv("SAEHUB_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert pick("cuda").name == "reference"
    monkeypatch.setenv("SAEHUB_KERNELS", "gpu")
    with pytest.raises(StageFailed, match="which are not there"):
        pick("cpu")
