"""SAEs and a model in; k-sparse probing on the labelled texts that the sae-probes wheel carries out: no download, the most reliable of SAEBench."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from saehub.api import EvalContext
from saehub.errors import UsageError, did_you_mean
from saehub.jsonio import sha256_file
from saehub_saebench.config import SaeProbesConfig
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.output import read
from saehub_saebench.rows import Scores, mean_over
from saehub_saebench.sae import BenchSAE

KINDS = ("test_accuracy", "test_auc", "test_f1")
ACTIVATIONS, BASELINES = "activations", "baselines"


class SaeProbes(BenchEvaluator):
    """`saebench/sae_probes`. Model activations and baselines are shared by all SAEs of a site; results are read from a private, empty folder,
    because sae-probes takes any result file of the same name for its own."""

    name = "sae_probes"

    def __init__(self, config: SaeProbesConfig | None = None):
        super().__init__(config or SaeProbesConfig())

    def metrics(self) -> list[str]:
        """Each kind at each k."""
        return [f"sae_top_k_{kind}@{k}" for k in self.config.ks for kind in KINDS]

    @property
    def _datasets(self) -> list[str]:
        from sae_probes import DATASETS

        return list(DATASETS) if self.config.dataset_names == ("all",) else list(self.config.dataset_names)

    def check(self, context: EvalContext) -> None:
        """Names of datasets that exist."""
        from sae_probes import DATASETS

        unknown = [name for name in self._datasets if name not in DATASETS]
        if unknown:
            raise UsageError(
                f"sae-probes has no dataset {unknown[0]!r}{did_you_mean(unknown[0], DATASETS)}", fix=f"one of {', '.join(DATASETS[:8])} …"
            )

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """The model's activations on every text, and the probes on them, at every site."""
        from sae_probes import run_baseline_evals
        from sae_probes.generate_model_activations import ensure_dataset_activations

        hooks = list(dict.fromkeys(sae.cfg.hook_name for sae in saes))
        names, label = self._datasets, saes[0].cfg.model_name
        kept = Path(context.work_dir).absolute() / "sae-probes-activations"  # the same under every seed: the seed only splits the texts
        if seed == self.config.seeds[0]:
            shutil.rmtree(kept, ignore_errors=True)
            for name in names:
                length = min(self.config.max_seq_len, context.model.shape.context)
                ensure_dataset_activations(
                    label, [name], hooks, kept, device=context.device, max_seq_len=length, batch_size=self.config.llm_batch_size, model=model
                )
        (shared / ACTIVATIONS).symlink_to(kept)
        if self.config.include_llm_baseline:
            for hook in hooks:
                run_baseline_evals(
                    model_name=label, hook_name=hook, setting="normal", method=self.config.baseline_method, results_path=shared / BASELINES,
                    model_cache_path=kept, datasets=names, device=context.device, seed=seed,
                )  # fmt: skip

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """SAEBench's wrapper over sae-probes, in this empty folder."""
        from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
        from sae_bench.evals.sparse_probing_sae_probes.main import run_eval

        if self.config.include_llm_baseline:
            shutil.copytree(shared / BASELINES, "results")
        config = SparseProbingSaeProbesEvalConfig(
            model_name=sae.cfg.model_name,
            random_seed=seed,
            dataset_names=self._datasets,
            reg_type=self.config.reg_type,
            ks=list(self.config.ks),
            results_path="results",
            model_cache_path=str(shared / ACTIVATIONS),
            include_llm_baseline=self.config.include_llm_baseline,
            baseline_method=self.config.baseline_method,
        )
        found = run_eval(config, [("saehub", sae)], context.device, "output")
        output = read(Path("output"), found)
        scores: dict[Key, Scores] = {(None, None): Scores(self._values(output["eval_result_metrics"]), output=output, note=mean_over(self._datasets))}
        for detail in output["eval_result_details"]:
            name = detail["dataset_name"]
            ks = {f"sae_top_{k}_{kind}": value for k, kinds in (detail["sae_metrics_by_k"] or {}).items() for kind, value in kinds.items()}
            scores[name, dataset_hash(name)] = Scores(self._values({"sae": ks, "llm": detail}))
        return scores

    def _values(self, metrics: dict[str, dict[str, Any]]) -> dict[str, float | None]:
        """Metrics by our names, from `{"sae": …, "llm": …}`."""
        values = {f"sae_top_k_{kind}@{k}": metrics["sae"].get(f"sae_top_{k}_{kind}") for k in self.config.ks for kind in KINDS}
        if self.config.include_llm_baseline:
            values |= {f"llm_{kind}": metrics["llm"].get(f"llm_{kind}") for kind in KINDS}
        return values


@lru_cache(maxsize=128)
def dataset_hash(name: str) -> str:
    """SHA-256 of the dataset's file in the sae-probes wheel."""
    from sae_probes.constants import DATA_PATH

    return sha256_file(DATA_PATH / "cleaned_data" / f"{name}.csv.zst")

