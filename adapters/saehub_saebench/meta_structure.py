"""SAEs in; how well a small SAE trained on each one's decoder rows explains them out: no model, no text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from saehub.api import EvalContext
from saehub_saebench.config import MetaStructureConfig
from saehub_saebench.definitions import BY_EVALUATOR
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.output import plain
from saehub_saebench.rows import Scores
from saehub_saebench.sae import BenchSAE


class MetaStructure(BenchEvaluator):
    """`saebench/meta_structure`. SAEBench seeds it only on its command line; here every run is seeded."""

    name = "meta_structure"
    needs_model = False

    def __init__(self, config: MetaStructureConfig | None = None):
        super().__init__(config or MetaStructureConfig())

    def metrics(self) -> list[str]:
        """Both."""
        return list(BY_EVALUATOR[self.name])

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """Train the meta-SAE under `seed` and measure it."""
        from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
        from sae_bench.evals.meta_structure.main import run_eval_single_sae

        settings = {name: value for name, value in asdict(self.config).items() if name != "seeds"}
        config = MetaStructureEvalConfig(**settings, random_seed=seed, autocast=False)
        result = run_eval_single_sae("saehub", "custom_sae", sae, config, context.device)
        found = result.eval_result_metrics.meta_structure
        values = {metric: float(getattr(found, metric)) for metric in self.metrics()}
        return {(None, None): Scores(values, output=plain(result))}
