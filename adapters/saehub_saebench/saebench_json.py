"""Measurements in, SAEBench's own result files out, validated by its classes; and such files, published ones too, as measurements."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saehub.api import Measurement
from saehub.errors import FormatError
from saehub_saebench.definitions import BY_EVALUATOR, of_metric
from saehub_saebench.rows import OUTPUT

# SAEBench's eval_type_id -> our evaluator
EVALS = {
    "core": "core",
    "sparse_probing": "sparse_probing",
    "sparse_probing_sae_probes": "sae_probes",
    "scr": "scr",
    "tpp": "tpp",
    "absorption_first_letter": "absorption",
    "ravel": "ravel",
    "unlearning": "unlearning",
    "autointerp": "autointerp",
    "meta_structure_decoder_variance": "meta_structure",
}
CLASSES = {
    "core": "core.eval_output:CoreEvalOutput",
    "sparse_probing": "sparse_probing.eval_output:SparseProbingEvalOutput",
    "sae_probes": "sparse_probing_sae_probes.eval_output:SparseProbingSaeProbesEvalOutput",
    "scr": "scr_and_tpp.eval_output:ScrEvalOutput",
    "tpp": "scr_and_tpp.eval_output:TppEvalOutput",
    "absorption": "absorption.eval_output:AbsorptionEvalOutput",
    "ravel": "ravel.eval_output:RAVELEvalOutput",
    "unlearning": "unlearning.eval_output:UnlearningEvalOutput",
    "autointerp": "autointerp.eval_output:AutoInterpEvalOutput",
    "meta_structure": "meta_structure.eval_output:MetaStructureEvalOutput",
}
"""Evaluator -> the pydantic class of its results, below sae_bench.evals."""
PATTERNS = (
    (re.compile(r"(sae|llm)_top_(\d+)_(test_\w+)"), r"\1_top_k_\3@\2"),
    (re.compile(r"scr_(\w+)_threshold_(\d+)"), r"scr_\1@\2"),
    (re.compile(r"tpp_threshold_(\d+)_(\w+)"), r"tpp_\2@\1"),
)
"""SAEBench's metric with a number inside -> ours with the number behind."""
FOREIGN = {
    "ce_loss_score": "ce_recovered_zero", "ce_loss_with_ablation": "ce_zero", "ce_loss_with_sae": "ce_spliced", "ce_loss_without_sae": "ce_clean",
    "kl_div_score": "kl_recovered_zero", "kl_div_with_ablation": "kl_zero", "kl_div_with_sae": "kl_spliced",
    "explained_variance": "fvu", "mse": "mse", "cossim": "cosine", "l0": "l0", "l1": "l1", "frac_alive": "never_fired_share",
}  # fmt: skip
"""SAEBench core's metric -> what saehub's own definitions call it; `fvu` and `never_fired_share` enter as 1 minus themselves."""
MAX_BYTES = 256 * 2**20


class SAEBenchJson:
    """The result format `saebench-json`; reading needs no library."""

    def __init__(self, config: Any = None):
        self.config = config

    # Reading

    def sniff(self, path: Path) -> bool:
        """A result file, or a folder that holds some; cheap, never raises on foreign files."""
        try:
            files = list(self._files(Path(path)))
            return bool(files) and "eval_type_id" in _load(files[0])
        except (OSError, ValueError, RecursionError, FormatError):
            return False

    @staticmethod
    def _files(path: Path) -> Iterator[Path]:
        yield from sorted(path.rglob("*_eval_results.json")) if path.is_dir() else [path] if path.suffix == ".json" else []

    def read(self, path: Path) -> list[Measurement]:
        """Every metric of every file; a -1 that stands for NaN has no value, and there are no standard errors."""
        return [row for file in self._files(Path(path)) for row in self._rows(file)]

    def _rows(self, file: Path) -> Iterator[Measurement]:
        data = _load(file)
        word = data.get("eval_type_id")
        if word not in EVALS:
            raise FormatError(f"{file}: eval_type_id {word!r} is not known", why=f"known: {', '.join(EVALS)}")
        evaluator = EVALS[word]
        config = data.get("eval_config") or {}
        names = config.get("dataset_names")
        dataset = "+".join(names) if names and evaluator in ("scr", "tpp") else config.get("dataset") or (config.get("dataset_name") if evaluator == "autointerp" else None)
        subject = "_".join(str(data.get(key)) for key in ("sae_lens_release_id", "sae_lens_id") if data.get(key))
        ours = str(data.get("sae_bench_commit_hash") or "").startswith("sae-bench ")
        for group in (data.get("eval_result_metrics") or {}).values():
            for name, value in group.items():
                metric = _ours(name)
                if metric.partition("@")[0] not in BY_EVALUATOR[evaluator] or value is None:
                    continue
                known = of_metric(evaluator, metric)
                lost = value == -1 and evaluator == "core" or not math.isfinite(value)
                unknown = evaluator == "absorption" and "fraction" in metric and not ours
                yield Measurement(
                    metric=metric,
                    value=None if lost else float(value),
                    subjects=(subject,),
                    evaluator=f"saebench/{evaluator}",
                    definition=known.id.removesuffix("/1") + "/0" if unknown else known.id,
                    dataset=dataset,
                    better=known.better,
                    version=str(data.get("sae_bench_commit_hash") or ""),
                    seed=config.get("random_seed"),
                    status="not_measured" if lost else "ok",
                    reason="published as -1: SAEBench has no number" if lost else None,
                    note=known.caveat,
                )

    # Writing

    def write(self, measurements: Sequence[Measurement], folder: Path) -> dict[str, list[str]]:
        """One file for each evaluator, SAE and dataset, below `folder`, in SAEBench's layout; what it cannot say is listed as left out."""
        files: list[str] = []
        left_out: list[str] = []
        groups: dict[tuple, list[Measurement]] = {}
        for row in measurements:
            groups.setdefault((row.evaluator, row.subjects, row.dataset if row.evaluator in ("native/core", "saebench/core", "saebench/autointerp") else None), []).append(row)
        for (evaluator, subjects, dataset), rows in groups.items():
            name = evaluator.partition("/")[2]
            output = next((row.parts[OUTPUT] for row in rows if OUTPUT in row.parts), None)
            if output is None and evaluator == "native/core":
                output = _core(rows)
            if output is None:
                left_out.append(f"{evaluator} of {'+'.join(subjects) or 'no SAE'}: " + (rows[0].reason or "SAEBench has no place for it"))
                continue
            output = {**output, "sae_lens_release_id": "+".join(subjects), "sae_lens_id": "custom_sae"}
            stem = "_".join(filter(None, ("+".join(subjects), dataset, "custom_sae_eval_results.json"))).replace("/", "_")
            target = Path(folder) / output.get("eval_type_id", name) / stem
            target.parent.mkdir(parents=True, exist_ok=True)
            text = validated(name, output)
            if target.exists() and not _same_results(target, text):
                raise FormatError(
                    f"{target} holds other results", why="another SAE's or another evaluation's, under the same name", fix="write to another folder, or delete that file"
                )
            target.write_text(text, encoding="utf-8")
            files.append(str(target))
        return {"files": files, "left_out": left_out}


def _same_results(path: Path, text: str) -> bool:
    """Whether a file that is there holds the metrics of `text`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["eval_result_metrics"] == json.loads(text)["eval_result_metrics"]
    except (ValueError, KeyError, TypeError):
        return False


def validated(evaluator: str, output: dict[str, Any]) -> str:
    """The JSON text that SAEBench's own class makes of `output`; FormatError in pydantic's words where it refuses."""
    from importlib import import_module

    from pydantic import TypeAdapter, ValidationError

    module, _, name = CLASSES[evaluator].partition(":")
    adapter = TypeAdapter(getattr(import_module(f"sae_bench.evals.{module}"), name))
    try:
        return adapter.dump_json(adapter.validate_python(output), indent=2).decode()
    except ValidationError as error:
        raise FormatError(f"SAEBench's {name} does not accept this result", said=str(error)) from error


def _core(rows: list[Measurement]) -> dict[str, Any]:
    """saehub's own measurements as a core result; what was not measured is -1, as SAEBench writes it, and listed beside."""
    import time
    import uuid

    values = {row.metric: row.value for row in rows if row.status == "ok"}
    found: dict[str, float] = {}
    for theirs, ours in FOREIGN.items():
        if values.get(ours) is not None:
            found[theirs] = 1 - values[ours] if ours in ("fvu", "never_fired_share") else values[ours]
    groups = {
        "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
        "model_performance_preservation": ("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
        "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
        "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
        "sparsity": ("l0", "l1"),
        "misc_metrics": (
            "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent", "normalized_freq_over_10_percent",
            "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim", "frac_alive",
        ),
    }  # fmt: skip
    metrics: dict[str, Any] = {group: {name: found.get(name, -1.0) for name in names} for group, names in groups.items()}
    metrics["token_stats"] = {"total_tokens_eval_reconstruction": -1, "total_tokens_eval_sparsity_variance": -1}
    about = {
        "by": f"saehub {rows[0].version}: values of native/core, whose definitions differ from SAEBench's where these are known to be off",
        "not_measured": [name for names in groups.values() for name in names if name not in found],
        "tensors": list(rows[0].subject_hashes),
        "dataset_hash": rows[0].dataset_hash,
    }
    return {
        "eval_type_id": "core",
        "eval_config": {"dataset": rows[0].dataset or ""},
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "eval_result_unstructured": {"saehub": about},
        "sae_bench_commit_hash": f"saehub {rows[0].version}",
        "sae_lens_version": "",
        "sae_cfg_dict": {},
    }


def _ours(name: str) -> str:
    for pattern, ours in PATTERNS:
        if pattern.fullmatch(name):
            return pattern.sub(ours, name)
    return name


def _load(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise FormatError(f"{file} has {file.stat().st_size} bytes", why="no SAEBench result is that long")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} is not JSON", said=str(error)) from error
    if not isinstance(data, dict):
        raise FormatError(f"{file} is not a JSON object")
    return data
