"""SAEs and a model in; spurious correlation removal and targeted probe perturbation, as SAEBench computes them and without padding, out."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saehub.api import EvalContext
from saehub.errors import UsageError
from saehub_saebench import hubdata
from saehub_saebench.config import ScrConfig, TppConfig
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.output import plain, provenance
from saehub_saebench.rows import Scores
from saehub_saebench.sae import BenchSAE
from saehub_saebench.standin import Identity, WithoutPadding


class _Perturbation(BenchEvaluator):
    """What SCR and TPP share: they differ in the probes that are trained and in the score."""

    scr = True
    kinds: tuple[str, ...] = ()
    """Metric names, without the threshold; the first is the one that is also given without padding."""

    def metrics(self) -> list[str]:
        """Each kind at each number of latents."""
        return [f"{kind}@{n}" for n in self.config.n_values for kind in (*self.kinds, f"{self.kinds[0]}_corrected")]

    def check(self, context: EvalContext) -> None:
        """Only two datasets are known to SAEBench here."""
        from sae_bench.evals.scr_and_tpp.main import COLUMN2_VALS_LOOKUP

        unknown = [name for name in self.config.dataset_names if name not in COLUMN2_VALS_LOOKUP]
        if unknown:
            raise UsageError(f"SAEBench knows no {unknown[0]!r} here", fix=f"dataset_names: {', '.join(COLUMN2_VALS_LOOKUP)}")
        hubdata.require(self.config.dataset_names, self.config.data_dir, self.name)

    def _settings(self, sae: Any, seed: int, n_values: list[int]) -> Any:
        from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

        left_out = ("seeds", "data_dir", "pairs", "n_values", "dataset_names")
        settings = {name: value for name, value in asdict(self.config).items() if name not in left_out}
        if getattr(self.config, "pairs", None):
            settings["column1_vals_lookup"] = {name: [tuple(pair) for pair in pairs] for name, pairs in self.config.pairs.items()}
        return ScrAndTppEvalConfig(
            **settings, dataset_names=list(self.config.dataset_names), n_values=n_values, perform_scr=self.scr, random_seed=seed,
            early_stopping_patience=self.config.probe_epochs, model_name=sae.cfg.model_name, llm_dtype=str(sae.dtype).removeprefix("torch."),
        )  # fmt: skip

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """SAEBench's cache of activations and probes, at every site."""
        from sae_bench.evals.scr_and_tpp.main import run_eval_single_sae

        for hook, sae in {sae.cfg.hook_name: sae for sae in saes}.items():
            identity = Identity(copy.copy(sae.cfg), sae.cfg.d_in, sae.device, sae.dtype)
            with hubdata.found_here(self.config.dataset_names, self.config.data_dir, self.name):
                run_eval_single_sae(self._settings(sae, seed, [2]), identity, model, context.device, str(shared / hook))

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """One SAE, with padding as SAEBench has it and without."""
        from sae_bench.evals.scr_and_tpp.main import run_eval_single_sae

        fits = [n for n in self.config.n_values if n <= sae.cfg.d_sae]
        values: dict[str, float | None] = dict.fromkeys(self.metrics())
        reasons = {
            name: f"the SAE has {sae.cfg.d_sae} latents" for name in values if int(name.partition("@")[2]) > sae.cfg.d_sae
        }
        output = None
        if fits:
            config = self._settings(sae, seed, fits)
            where = (model, context.device, str(shared / sae.cfg.hook_name))
            found, by_class = run_eval_single_sae(config, sae, *where)
            corrected, _ = run_eval_single_sae(config, WithoutPadding(sae), *where)
            output = plain(self._output(config, found, by_class, sae))
            for n in fits:
                values |= {f"{kind}@{n}": found.get(self._key(kind, n)) for kind in self.kinds}
                values[f"{self.kinds[0]}_corrected@{n}"] = corrected.get(self._key(self.kinds[0], n))
        names = list(self.config.dataset_names)
        return {("+".join(names), hubdata.identity(names, self.config.data_dir)): Scores(values, reasons, output)}

    def _key(self, kind: str, n: int) -> str:
        """SAEBench's name of a metric."""
        group, _, rest = kind.partition("_")
        return f"{group}_{rest}_threshold_{n}" if self.scr else f"{group}_threshold_{n}_{rest}"

    def _output(self, config: Any, found: dict[str, Any], by_class: dict, sae: BenchSAE) -> Any:
        from sae_bench.evals.scr_and_tpp import eval_output as out

        flat = {key: value for key, value in found.items() if not isinstance(value, dict)}
        nested = {key: value for key, value in found.items() if isinstance(value, dict)}
        common = {"eval_config": config, **provenance(sae)}
        if self.scr:
            details = [out.ScrResultDetail(dataset_name=name, **value) for name, value in nested.items()]
            return out.ScrEvalOutput(
                eval_result_metrics=out.ScrMetricCategories(scr_metrics=out.ScrMetrics(**flat)), eval_result_details=details, **common
            )
        details = [out.TppResultDetail(dataset_name=name, **value) for name, value in nested.items()]
        return out.TppEvalOutput(
            eval_result_metrics=out.TppMetricCategories(tpp_metrics=out.TppMetrics(**flat)),
            eval_result_details=details,
            eval_result_unstructured=by_class,
            **common,
        )


class Scr(_Perturbation):
    """`saebench/scr`."""

    name = "scr"
    scr = True
    kinds = ("scr_metric", "scr_dir1", "scr_dir2")

    def __init__(self, config: ScrConfig | None = None):
        super().__init__(config or ScrConfig())


class Tpp(_Perturbation):
    """`saebench/tpp`."""

    name = "tpp"
    scr = False
    kinds = ("tpp_total_metric", "tpp_intended_diff_only", "tpp_unintended_diff_only")

    def __init__(self, config: TppConfig | None = None):
        super().__init__(config or TppConfig())
