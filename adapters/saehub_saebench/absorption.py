"""SAEs of a residual stream and a model that can spell in; first-letter absorption by SAEBench's own functions, nothing written beside, out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saehub.api import EvalContext
from saehub_saebench.config import AbsorptionConfig
from saehub_saebench.definitions import BY_EVALUATOR
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.output import plain, provenance
from saehub_saebench.rows import Scores
from saehub_saebench.sae import BenchSAE


class Absorption(BenchEvaluator):
    """`saebench/absorption`. Probes of the model are trained once a seed and layer, in a private folder (SAEBench keeps them in site-packages
    under the model's bare name), and seeded from here: SAEBench ignores its own `random_seed`."""

    name = "absorption"
    remembers = True

    def __init__(self, config: AbsorptionConfig | None = None):
        super().__init__(config or AbsorptionConfig())

    def metrics(self) -> list[str]:
        """All six."""
        return list(BY_EVALUATOR[self.name])

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """First-letter probes on the model, at every layer."""
        from sae_bench.evals.absorption.common import train_and_save_probes

        if self._letters(model):
            return
        with named(model, saes[0].cfg.model_name):
            train_and_save_probes(
                model,
                layers=sorted({sae.cfg.hook_layer for sae in saes}),
                base_template=self.config.prompt_template,
                pos_idx=self.config.prompt_token_pos,
                probes_dir=shared / "probes",
                device=context.device,
            )

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """One SAE; without a result where the model cannot spell, as SAEBench, but saying so."""
        from sae_bench.evals.absorption.feature_absorption import run_feature_absortion_experiment
        from sae_bench.evals.absorption.k_sparse_probing import run_k_sparse_probing_experiment
        from sae_bench.evals.absorption.main import _aggregate_results_df

        config = self.config
        reason = self._letters(model) or _unlearnt(shared / "probes" / sae.cfg.model_name / f"layer_{sae.cfg.hook_layer}" / "train_df.csv")
        if reason:
            return {(None, None): self._nothing(reason)}
        common = dict(
            model=model, sae=sae, layer=sae.cfg.hook_layer, sae_name="sae", max_k_value=config.max_k_value, prompt_template=config.prompt_template,
            prompt_token_pos=config.prompt_token_pos, device=context.device, probes_dir=shared / "probes",
        )  # fmt: skip
        with named(model, sae.cfg.model_name):
            probing = run_k_sparse_probing_experiment(
                **common,
                experiment_dir="k_sparse",
                f1_jump_threshold=config.f1_jump_threshold,
                k_sparse_probe_l1_decay=config.k_sparse_probe_l1_decay,
                k_sparse_probe_batch_size=config.k_sparse_probe_batch_size,
                k_sparse_probe_num_epochs=config.k_sparse_probe_num_epochs,
                precalc_k_sparse_probe_sae_acts=config.precalc_k_sparse_probe_sae_acts,
                eval_batch_size=config.eval_k_sparse_probe_batch_size,
            )
            told = int((probing["f1_probe"] > config.min_GT_probe_f1).sum())
            if told < config.min_feats_for_eval:
                return {(None, None): self._nothing(
                    f"the model cannot spell here: its activations tell {told} of 26 first letters with F1 above {config.min_GT_probe_f1}, "
                    f"{config.min_feats_for_eval} are needed (SAEBench ends without a result)"
                )}  # fmt: skip
            raw = run_feature_absortion_experiment(
                **common,
                experiment_dir="absorption",
                sparse_probing_experiment_dir="k_sparse",
                feature_split_f1_jump_threshold=config.f1_jump_threshold,
                batch_size=config.llm_batch_size,
            )
        good = set(probing[probing["f1_probe"] > config.min_GT_probe_f1]["letter"])
        letters = [row for _, row in _aggregate_results_df(raw).iterrows() if row["letter"] in good]
        return {(None, None): self._scores(letters, sae, seed)}

    def _scores(self, letters: list[Any], sae: BenchSAE, seed: int) -> Scores:
        from sae_bench.evals.absorption import eval_output as out
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

        columns = {"absorption_fraction": "mean_absorption_fraction", "full_absorption": "full_absorption_rate", "num_split_features": "num_split_feats"}
        values: dict[str, float] = {}
        for metric, column in columns.items():
            numbers = [float(row[column]) for row in letters]
            suffix = "" if metric == "num_split_features" else "_score"
            values[f"mean_{metric}{suffix}"] = statistics.mean(numbers)
            values[f"std_dev_{metric}{suffix}"] = statistics.stdev(numbers)
        settings = {name: value for name, value in asdict(self.config).items() if name != "seeds"}
        result = out.AbsorptionEvalOutput(
            eval_config=AbsorptionEvalConfig(**settings, model_name=sae.cfg.model_name, random_seed=seed, llm_dtype=str(sae.dtype).removeprefix("torch.")),
            eval_result_metrics=out.AbsorptionMetricCategories(mean=out.AbsorptionMeanMetrics(**values)),
            eval_result_details=[
                out.AbsorptionResultDetail(
                    first_letter=row["letter"],
                    mean_absorption_fraction=row["mean_absorption_fraction"],
                    full_absorption_rate=row["full_absorption_rate"],
                    num_full_absorption=int(row["num_full_absorption"]),
                    num_probe_true_positives=int(row["num_probe_true_positives"]),
                    num_split_features=int(row["num_split_feats"]),
                )
                for row in letters
            ],
            **provenance(sae),
        )
        return Scores({metric: values[metric] for metric in self.metrics()}, output=plain(result))

    def _nothing(self, reason: str) -> Scores:
        return Scores(dict.fromkeys(self.metrics()), dict.fromkeys(self.metrics(), reason))

    @staticmethod
    def _letters(model: Any) -> str | None:
        """Why the tokenizer's words cannot be spelled from: SAEBench fails on a letter that no word begins with."""
        from sae_bench.evals.absorption.vocab import LETTERS, get_alpha_tokens

        first = {word.strip()[0].lower() for word in get_alpha_tokens(model.tokenizer)}
        absent = [letter for letter in LETTERS if letter not in first]
        return f"no word of the tokenizer begins with {', '.join(absent)}; SAEBench needs all 26 letters" if absent else None


def _unlearnt(words: Path) -> str | None:
    """Why the probe's words will not do: SAEBench fails where no word of a letter is among those it trains on."""
    import pandas as pd

    table = pd.read_csv(words, keep_default_na=False)
    absent = [letter for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz") if number not in set(table["answer_class"])]
    told = f"of the {len(table)} words that the probes are trained on none begins with {', '.join(absent)}"
    return f"the model cannot spell here: {told}, and SAEBench needs all 26 letters" if absent else None


@contextmanager
def named(model: Any, label: str) -> Iterator[None]:
    """The model's name as a relative path component, while SAEBench makes folder names of it."""
    before = model.cfg.model_name
    model.cfg.model_name = label
    try:
        yield
    finally:
        model.cfg.model_name = before
