"""SAEBench's result files in and out; proof that its own classes accept what is written, and that what is read is what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from saehub.api import Measurement
from saehub.errors import FormatError, UsageError
from saehub_saebench.rows import OUTPUT
from saehub_saebench.saebench_json import CLASSES, EVALS, SAEBenchJson

PUBLISHED = {
    "core": ({"model_performance_preservation": {"ce_loss_score": 0.95}, "model_behavior_preservation": {"kl_div_score": -1}, "sparsity": {"l0": 20.0}},
             {"dataset": "Skylion007/openwebtext"}),
    "scr": ({"scr_metrics": {"scr_metric_threshold_10": 0.3, "scr_dir1_threshold_2": None}}, {"dataset_names": ["a", "b"], "random_seed": 42}),
    "tpp": ({"tpp_metrics": {"tpp_threshold_10_total_metric": 0.1}}, {"dataset_names": ["a"]}),
    "sparse_probing": ({"llm": {"llm_test_accuracy": 0.9}, "sae": {"sae_top_5_test_accuracy": 0.8}}, {}),
    "absorption_first_letter": ({"mean": {"mean_absorption_fraction_score": 0.2, "mean_full_absorption_score": 0.1}}, {}),
}  # fmt: skip


def published(folder: Path, word: str, **more) -> Path:
    """A result file as it stands on the hub."""
    metrics, config = PUBLISHED[word]
    data = {"eval_type_id": word, "eval_config": config, "eval_result_metrics": metrics, "sae_lens_release_id": "release", "sae_lens_id": "sae", "sae_bench_commit_hash": "abc"}
    path = folder / f"{word}_eval_results.json"
    path.write_text(json.dumps({**data, **more}))
    return path


@pytest.mark.quick
def test_published_files_are_read_with_our_names(tmp_path):
    for word in PUBLISHED:
        published(tmp_path, word)
    (tmp_path / "other.json").write_text("[]")
    codec = SAEBenchJson()
    assert codec.sniff(tmp_path) and codec.sniff(tmp_path / "core_eval_results.json") and not codec.sniff(tmp_path / "other.json")
    rows = {(row.evaluator, row.metric): row for row in codec.read(tmp_path)}
    assert rows["saebench/core", "ce_loss_score"].value == 0.95 and rows["saebench/core", "ce_loss_score"].dataset == "Skylion007/openwebtext"
    lost = rows["saebench/core", "kl_div_score"]
    assert lost.value is None and lost.status == "not_measured" and "-1" in lost.reason
    assert rows["saebench/scr", "scr_metric@10"].value == 0.3 and rows["saebench/scr", "scr_metric@10"].seed == 42
    assert ("saebench/scr", "scr_dir1@2") not in rows
    assert rows["saebench/tpp", "tpp_total_metric@10"].value == 0.1
    assert rows["saebench/sparse_probing", "sae_top_k_test_accuracy@5"].value == 0.8
    # The fraction was redefined, and a published file does not say by which definition it is: never compared with ours.
    assert rows["saebench/absorption", "mean_absorption_fraction_score"].definition.endswith("/0")
    assert rows["saebench/absorption", "mean_full_absorption_score"].definition.endswith("/1")
    assert {row.stderr for row in rows.values()} == {None}


def measured(metric: str, value: float, **more) -> Measurement:
    """A row of native/core or saebench/core."""
    known = {"evaluator": "saebench/core", "definition": f"saebench.core.{metric}/1", "dataset": "in_sample", "dataset_hash": "d", "subject_hashes": ("h",)}
    return Measurement(metric, value, ("mine",), **{**known, **more})


@pytest.mark.quick
def test_a_published_file_stands_beside_a_run(saehub_command, tmp_path):
    """`saehub runs compare`: the datasets have two names, and the published number has no error, so that nothing is ranked."""
    from saehub.jsonio import write_json_atomic

    run = tmp_path / "run"
    run.mkdir()
    rows = [measured("ce_loss_score", 0.97, stderr=0.01, better="higher"), measured("l0", 21.0, stderr=0.1)]
    write_json_atomic(run / "results.json", {"schema": 1, "measurements": [row.to_json() for row in rows]})
    code, text = saehub_command("runs", "compare", str(run), str(published(tmp_path, "core")), "--json")
    found = {item["metric"]: item for item in json.loads(text)["differences"]}
    assert code == 0 and found["ce_loss_score"]["delta"] == pytest.approx(-0.02)
    assert found["ce_loss_score"]["verdict"] == "not ranked" and "standard error" in found["ce_loss_score"]["reason"]


@pytest.fixture
def saehub_command():
    """A function: words -> (exit code, stdout)."""
    from click.testing import CliRunner

    from saehub.cli.main import cli

    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, list(words), standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return int(done.return_value or 0), done.stdout

    return call


@pytest.mark.quick
def test_a_format_that_does_not_exist_is_refused_before_work():
    from saehub.report import foreign

    with pytest.raises(UsageError, match="no results is called 'saebench-jsn'"):
        foreign.check("saebench-jsn=somewhere")


def test_native_core_is_written_as_saebench_core_and_validates(tmp_path):
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    native = {"evaluator": "native/core", "definition": "saehub.fvu/1"}
    rows = [measured("fvu", 0.1, **native), measured("ce_recovered_zero", 0.9, **native), measured("l0", 32.0, **native), measured("x", 1.0, evaluator="native/other", definition="a.b/1")]
    told = SAEBenchJson().write(rows, tmp_path)
    (file,) = told["files"]
    read = TypeAdapter(CoreEvalOutput).validate_json(Path(file).read_text())
    assert read.eval_result_metrics.reconstruction_quality.explained_variance == pytest.approx(0.9)
    assert read.eval_result_metrics.model_performance_preservation.ce_loss_score == 0.9
    assert read.eval_result_metrics.shrinkage.l2_ratio == -1  # SAEBench's own word for what was not measured
    assert "l2_ratio" in read.eval_result_unstructured["saehub"]["not_measured"]
    assert read.sae_lens_release_id == "mine" and len(told["left_out"]) == 1
    assert SAEBenchJson().write(rows, tmp_path)["files"] == told["files"], "the same results may be written again"
    with pytest.raises(FormatError, match="holds other results"):
        SAEBenchJson().write([replace(rows[0], value=0.2), *rows[1:]], tmp_path)


def test_every_result_class_is_saebench_s():
    from importlib import import_module

    assert set(CLASSES) == set(EVALS.values())
    for word, evaluator in EVALS.items():
        module, _, name = CLASSES[evaluator].partition(":")
        cls = getattr(import_module(f"sae_bench.evals.{module}"), name)
        assert cls.__dataclass_fields__["eval_type_id"].default.default == word or word in str(cls.__dataclass_fields__["eval_type_id"].default)


def test_what_saebench_refuses_is_an_error_in_its_words(tmp_path):
    broken = replace(measured("l0", 1.0), parts={OUTPUT: {"eval_type_id": "core", "eval_result_metrics": {}}})
    with pytest.raises(FormatError, match="CoreEvalOutput does not accept") as error:
        SAEBenchJson().write([broken], tmp_path)
    assert "validation error" in error.value.said
