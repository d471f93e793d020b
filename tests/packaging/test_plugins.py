"""A clean environment in; a plugin that `saehub plugins new` starts there, built, installed, tested, and run beside other libraries, out."""

from __future__ import annotations

import json
import sys

import pytest

NAME, MODULE = "saehub-fresh", "saehub_fresh"
# Its trainer beside ours, SAEBench's core evaluator on both, its exporter for both and SAELens' for the one that SAELens can say.
MIXED = """
saehub: 1
name: mixed
model: {name: builtin/tiny-llama}
data:
  train: {source: builtin/python-docs, tokens: 16_384, context: 64}
  eval: {in_sample: {source: builtin/python-docs, split: heldout, tokens: 6_400}}
extract: {uses: native/hf, sites: [resid_post.2], normalize: sqrt_d, calibration: 2_048, block: 8_192}
train:
  - {id: peak, uses: fresh/peak, with: {tau: 0.3}}
  - {id: topk, uses: native/topk, with: {k: 8, width: 512, batch: 256}}
evaluate:
  - {uses: saebench/core, with: {n_eval_reconstruction_batches: 1, n_eval_sparsity_variance_batches: 1}}
  - {uses: fresh/dominance}
export:
  - {uses: fresh/folio}
  - {uses: saelens, saes: [topk]}
"""


@pytest.fixture(scope="module")
def fresh(clean, tmp_path_factory, tools):
    """The plugin's folder, its wheel installed in the clean environment."""
    folder = tmp_path_factory.mktemp("plugin") / NAME
    options = tools.outside(folder.parent)
    tools.run([clean / "saehub", "plugins", "new", folder, "--name", NAME], **options)
    wheel = tools.build(folder, folder.parent / "dist")
    if tools.uv():
        tools.run([tools.uv(), "pip", "install", "--quiet", "--no-deps", "--python", clean / "python", wheel])
    else:
        tools.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefix", clean.parent, wheel])
    return folder


def test_it_is_listed_with_everything_it_has(fresh, clean, tmp_path, tools):
    rows = json.loads(tools.run([clean / "saehub", "plugins", "ls", "--json"], **tools.outside(tmp_path)).stdout)["plugins"]
    (row,) = [row for row in rows if row["name"] == "fresh"]
    assert (row["distribution"], row["status"]) == (NAME, "ok")
    assert {item["kind"] for item in row["components"]} == {"extractor", "trainer", "evaluator", "exporter"}
    assert [item["name"] for item in row["architectures"]] == [f"{MODULE}_peak"] and len(row["recipes"]) == 2


def test_its_own_tests_pass(fresh, clean, tmp_path, tools):
    options = tools.outside(tmp_path)
    done = tools.run([clean / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", fresh / "tests"], **options)
    assert "12 passed" in done.stdout


def test_its_components_mix_with_those_of_other_libraries(fresh, clean, tmp_path, tools):
    (tmp_path / "mixed.yaml").write_text(MIXED, encoding="utf-8")
    options = tools.outside(tmp_path)
    tools.run([clean / "saehub", "recipe", "run", tmp_path / "mixed.yaml", "--out", tmp_path / "run"], **options)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["measurements"]
    done = {(row["evaluator"], row["subjects"][0]) for row in results if row["status"] == "ok"}
    assert {(evaluator, sae) for evaluator in ("saebench/core", "fresh/dominance") for sae in ("peak", "topk")} <= done
    outcomes = {
        path.parent.relative_to(tmp_path / "run" / "exports").as_posix(): json.loads(path.read_text())["outcome"]
        for path in (tmp_path / "run" / "exports").glob("*/*/conversion.json")
    }
    equation, library = "verified against the published equation", "verified by the target's library"
    assert outcomes == {"folio/peak": equation, "folio/topk": equation, "saelens/topk": library}
    checkpoint = tmp_path / "run" / "checkpoints" / "peak"
    assert "verified" in tools.run([clean / "saehub", "verify", checkpoint], **options).stdout
    refused = tools.run([clean / "saehub", "convert", checkpoint, tmp_path / "no", "--to", "saelens"], code=1, **options)
    assert f"{MODULE}_peak" in refused.stderr
    without = tools.run([clean / "saehub", "verify", checkpoint], code=1, **{**options, "env": {**options["env"], "SAEHUB_DISABLE_PLUGINS": "fresh"}})
    assert f"pip install {NAME}" in without.stderr
