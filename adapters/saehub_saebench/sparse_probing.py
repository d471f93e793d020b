"""SAEs and a model in; SAEBench's own k-sparse probing, on its hub datasets or on labelled texts of yours, out."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saehub.api import EvalContext
from saehub.errors import UsageError
from saehub.jsonio import hash_json, sha256_file
from saehub_saebench import hubdata
from saehub_saebench.config import SparseProbingConfig
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.output import plain, provenance
from saehub_saebench.rows import Scores, mean_over
from saehub_saebench.sae import BenchSAE
from saehub_saebench.standin import Identity


class SparseProbing(BenchEvaluator):
    """`saebench/sparse_probing`. Activations, and probes on them, are made once for all SAEs of a site; every SAE takes the same path, the
    one that SAEBench itself takes from the second SAE on."""

    name = "sparse_probing"

    def __init__(self, config: SparseProbingConfig | None = None):
        super().__init__(config or SparseProbingConfig())

    def metrics(self) -> list[str]:
        """At each k."""
        return ["sae_test_accuracy", *(f"sae_top_k_test_accuracy@{k}" for k in self.config.k_values)]

    def check(self, context: EvalContext) -> None:
        """Datasets that are there, and known."""
        from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

        for name in self.config.published():
            if name not in chosen_classes_per_dataset:
                raise UsageError(
                    f"SAEBench knows no dataset {name!r}", fix=f"one of {', '.join(chosen_classes_per_dataset)}, or labelled: {{{name}: FOLDER}}"
                )
        hubdata.require(self.config.published(), self.config.data_dir, self.name)

    def _settings(self, sae: BenchSAE, seed: int) -> Any:
        from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

        settings = {name: value for name, value in asdict(self.config).items() if name not in ("seeds", "data_dir", "labelled")}
        settings |= {"dataset_names": list(self.config.dataset_names), "k_values": list(self.config.k_values)}
        return SparseProbingEvalConfig(**settings, random_seed=seed, model_name=sae.cfg.model_name, llm_dtype=str(sae.dtype).removeprefix("torch."))

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """SAEBench's cache of activations and probe accuracies, at every site."""
        from sae_bench.evals.sparse_probing.main import run_eval_single_sae

        for hook, sae in {sae.cfg.hook_name: sae for sae in saes}.items():
            folder = shared / hook
            folder.mkdir()
            for name, source in self.config.labelled.items():
                if name in self.config.dataset_names:
                    self._label(name, Path(source), sae, model, seed, folder, context)
            identity = Identity(copy.copy(sae.cfg), sae.cfg.d_in, sae.device, sae.dtype)
            with hubdata.found_here(self.config.published(), self.config.data_dir, self.name):
                run_eval_single_sae(self._settings(sae, seed), identity, model, context.device, str(folder))

    def _label(self, name: str, source: Path, sae: BenchSAE, model: Any, seed: int, folder: Path, context: EvalContext) -> None:
        """The cache file that SAEBench would write, from a folder of one's own with SAEBench's own functions."""
        import random

        import torch
        from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
        from sae_bench.sae_bench_utils import activation_collection as activations
        from sae_bench.sae_bench_utils.dataset_utils import tokenize_data_dictionary

        config = self._settings(sae, seed)
        sizes = {"train": config.probe_train_set_size // 2, "test": config.probe_test_set_size // 2}
        found: dict[str, Any] = {}
        for part, size in sizes.items():
            texts = labelled(source, part)
            for label, lines in texts.items():
                if len(lines) < size:
                    raise UsageError(
                        f"{source} has {len(lines)} {part} texts of class {label!r}, {size} are needed", where="labelled", fix=f"probe_{part}_set_size: {2 * len(lines)}"
                    )
            chosen = {label: random.Random(seed).sample(lines, size) for label, lines in sorted(texts.items())}
            tokens = tokenize_data_dictionary(chosen, model.tokenizer, config.context_length, context.device)
            found[part] = activations.get_all_llm_activations(
                tokens, model, config.llm_batch_size, sae.cfg.hook_layer, sae.cfg.hook_name, mask_bos_pad_eos_tokens=True
            )
        means = [activations.create_meaned_model_activations(found[part]) for part in ("train", "test")]
        accuracies = {"llm_test_accuracy": train_probe_on_activations(*means, select_top_k=None, use_sklearn=False, batch_size=250, epochs=100, lr=1e-2)[1]}
        for k in config.k_values:
            accuracies[f"llm_top_{k}_test_accuracy"] = train_probe_on_activations(*means, select_top_k=k)[1]
        torch.save({**found, "llm_results": accuracies}, folder / f"{name}_activations.pt".replace("/", "_"))

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """One SAE on every dataset, and the mean over them."""
        from sae_bench.evals.sparse_probing import eval_output as out
        from sae_bench.evals.sparse_probing.main import run_eval_single_sae

        config = self._settings(sae, seed)
        found, by_class = run_eval_single_sae(config, sae, model, context.device, str(shared / sae.cfg.hook_name))
        groups = {side: {key: value for key, value in found.items() if key.startswith(side) and not isinstance(value, dict)} for side in ("llm_", "sae_")}
        result = out.SparseProbingEvalOutput(
            eval_config=config,
            eval_result_metrics=out.SparseProbingMetricCategories(
                llm=out.SparseProbingLlmMetrics(**groups["llm_"]), sae=out.SparseProbingSaeMetrics(**groups["sae_"])
            ),
            eval_result_details=[
                out.SparseProbingResultDetail(dataset_name=name, **value) for name, value in found.items() if isinstance(value, dict)
            ],
            eval_result_unstructured=by_class,
            **provenance(sae),
        )
        names = list(self.config.dataset_names)
        scores: dict[Key, Scores] = {(None, None): Scores(self._values(found), output=plain(result), note=mean_over(names))}
        for name in names:
            scores[name, self._hash(name)] = Scores(self._values(found[f"{name}_results"]))
        return scores

    def _hash(self, name: str) -> str:
        if name in self.config.labelled:
            folder = Path(self.config.labelled[name]).expanduser()
            return hash_json([sha256_file(folder / f"{part}.jsonl") for part in ("train", "test")])
        return hubdata.identity([name], self.config.data_dir)

    def _values(self, found: dict[str, Any]) -> dict[str, float]:
        values = {"sae_test_accuracy": found["sae_test_accuracy"]}
        values |= {f"sae_top_k_test_accuracy@{k}": found[f"sae_top_{k}_test_accuracy"] for k in self.config.k_values}
        values["llm_test_accuracy"] = found["llm_test_accuracy"]
        return values | {f"llm_top_k_test_accuracy@{k}": found[f"llm_top_{k}_test_accuracy"] for k in self.config.k_values}


def labelled(folder: Path, part: str) -> dict[str, list[str]]:
    """`part`.jsonl of a folder, lines of {"text": …, "label": …}, as {label: texts}."""
    file = folder.expanduser() / f"{part}.jsonl"
    if not file.is_file():
        raise UsageError(f"{file} does not exist", where="labelled", fix='train.jsonl and test.jsonl, lines of {"text": …, "label": …}')
    found: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.setdefault(str(row["label"]), []).append(str(row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}:{number} is no labelled text", why=str(error), fix='{"text": "…", "label": "…"}') from error
    return found
