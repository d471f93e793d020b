"""The checkout in; its wheel, and a clean environment that holds it, out: built once a test file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


def run(command: list[str | Path], code: int = 0, **options) -> subprocess.CompletedProcess:
    """A finished process; its stderr is the message when it failed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == code, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


def uv() -> str | None:
    """The uv that runs us, or the one on the path."""
    return os.environ.get("UV") or shutil.which("uv")


def build(folder: Path, out: Path) -> Path:
    """The wheel of a project."""
    run([uv(), "build", "--wheel", "--quiet", "--out-dir", out, folder] if uv() else [sys.executable, "-m", "build", "--wheel", "--outdir", out, folder])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built as a user would."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new environment that holds the wheel, and sees our dependencies but not our editable install.

    The dependencies' folder is one line of a .pth file: Python adds it to the path, after the environment's own, and does not process the
    .pth files in it, which is where an editable install points at the checkout.
    """
    folder = tmp_path_factory.mktemp("clean") / "env"
    if uv():
        run([uv(), "venv", "--quiet", "--python", sys.executable, folder])
        run([uv(), "pip", "install", "--quiet", "--no-deps", "--python", folder / "bin" / "python", wheel])
    else:
        run([sys.executable, "-m", "venv", "--without-pip", folder])
        run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefix", folder, wheel])
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def outside(tmp_path: Path) -> dict:
    """Another working folder, and no variable that could lead back to the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SAEHUB_", "VIRTUAL_ENV", "UV_"))}
    return {"cwd": tmp_path, "env": {**environment, "SAEHUB_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}}


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """`run(command)` checks the exit code; `outside(tmp_path)` are the options of a process that cannot see the checkout; `build(folder, out)` makes a wheel."""
    return SimpleNamespace(run=run, outside=outside, build=build, uv=uv)
