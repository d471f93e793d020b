"""The checkout in; a wheel whose contents are known, and which works from another folder in a clean environment, out."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLUGIN_PACKAGES = sorted(path.parent for folder in ("adapters", "plugins") for path in (ROOT / folder).glob("saehub_*/__init__.py"))
WEIGHTS = "saehub/builtin/tiny_llama/model.safetensors"


@pytest.fixture(scope="module")
def contents(wheel) -> dict[str, int]:
    """File name -> size."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


# ---------------------------------------------------------------------- what is in it
@pytest.mark.quick
@pytest.mark.parametrize("package", PLUGIN_PACKAGES, ids=lambda path: path.name)
def test_every_plugin_package_is_in_the_wheel_and_has_an_entry_point(package):
    relative = package.relative_to(ROOT).as_posix()
    assert relative in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert package.name in PROJECT["project"]["entry-points"]["saehub.plugins"].values()


@pytest.mark.quick
def test_the_wheel_includes_no_folder_that_does_not_exist():
    for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        assert (ROOT / path).is_dir(), path


@pytest.mark.quick
def test_extras_are_complete():
    """`all` names every other extra, and every extra that a component names exists."""
    from saehub.api import KINDS
    from saehub.plugins import catalog

    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(everything.removeprefix("saehub[").removesuffix("]").split(",")) == set(extras) - {"all"}
    ours = [item for kind in KINDS for item in catalog().components(kind).values() if item.distribution == "saehub"]
    for item in ours:
        assert not item.component.requires or item.component.extra in extras, f"{item.address} requires a library, but no extra installs it"


def test_nothing_else_lies_at_the_top_of_the_wheel(contents):
    packages = {"saehub", *(path.name for path in PLUGIN_PACKAGES)}
    tops = {name.partition("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    assert len(tops - packages) == 1


def test_every_source_file_is_in_the_wheel(contents):
    for package in (ROOT / "saehub", *PLUGIN_PACKAGES):
        for file in package.rglob("*.py"):
            assert file.relative_to(package.parent).as_posix() in contents
    assert not [name for name in contents if "__pycache__" in name or name.endswith((".pyc", ".orig", ".tmp"))]


def test_recipes_lie_inside_the_package(contents):
    recipes = {f"saehub/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes and recipes == {name for name in contents if name.startswith("saehub/recipes/")}


def test_the_embedded_model_and_the_report_template_are_inside(contents):
    assert 1e6 < contents[WEIGHTS] <= 8e6
    folder = {Path(name).name for name in contents if name.startswith("saehub/builtin/tiny_llama/")}
    assert {"config.json", "tokenizer.json", "README.md"} <= folder
    templates = [path for path in (ROOT / "saehub" / "report" / "templates").rglob("*") if path.is_file()]
    assert templates and all(path.relative_to(ROOT).as_posix() in contents for path in templates)


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 12e6


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert (
        "Requires-Python: <3.13,>=3.11" in text and "Provides-Extra: saelens" in text and "Description-Content-Type: text/markdown" in text
    )
    assert "saehub = saehub.cli.main:main" in points and "saehub = saehub.testing.pytest_plugin" in points


# ---------------------------------------------------------------------- whether it works
def test_it_is_the_wheel_that_is_imported(clean, tmp_path, tools):
    code = "import saehub, saehub_native, saehub_saelens; print(saehub.__file__, saehub_native.__file__, saehub_saelens.__file__)"
    files = tools.run([clean / "python", "-c", code], **tools.outside(tmp_path)).stdout.split()
    assert len(files) == 3 and all(file.startswith(str(clean.parent)) for file in files)


def test_plugins_are_found_in_the_clean_environment(clean, tmp_path, tools):
    listing = tools.run([clean / "saehub", "plugins", "ls", "--json"], **tools.outside(tmp_path)).stdout
    assert "native/topk" in listing and "saelens/saelens" in listing
    rows = json.loads(listing)["plugins"]
    assert [row["status"] for row in rows if row["distribution"] == "saehub"] == ["ok"] * len(PLUGIN_PACKAGES)


def test_a_recipe_is_planned_from_another_folder(clean, tmp_path, tools):
    done = tools.run([clean / "saehub", "recipe", "plan", "topk-llama", "--json"], **tools.outside(tmp_path))
    plan = json.loads(done.stdout)["plan"]
    assert {"tokens", "train", "evaluate", "export"} <= {stage["kind"] for stage in plan["stages"]}
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.safetensors"))


def test_the_embedded_model_loads_from_the_wheel(clean, tmp_path, tools):
    code = (
        "from safetensors import safe_open\nfrom saehub.api import ModelSpec\nfrom saehub.data.model import model_dir_or_id, read_shape\n"
        "folder = model_dir_or_id(ModelSpec('builtin/tiny-llama'))\nprint(folder, read_shape('builtin/tiny-llama').family)\n"
        "print(len(safe_open(folder / 'model.safetensors', 'numpy').keys()))"
    )
    folder, family, tensors = tools.run([clean / "python", "-c", code], **tools.outside(tmp_path)).stdout.split()
    assert folder.startswith(str(clean.parent)) and family == "llama" and int(tensors) > 30


def test_pytest_elsewhere_is_not_disturbed(clean, tmp_path, tools):
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n\ndef test_light():\n    assert not {'torch', 'transformers', 'saehub.plugins', 'saehub.api'} & set(sys.modules)\n"
    )
    done = tools.run([clean / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path], **tools.outside(tmp_path))
    assert "1 passed" in done.stdout
    listing = tools.run([clean / "python", "-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider", tmp_path], **tools.outside(tmp_path)).stdout
    assert "saehub_tiny_model" in listing and "saehub_planted" in listing
