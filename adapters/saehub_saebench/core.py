"""SAEs, a model and packed text in; SAEBench core's numbers, with corrected ones beside those that are known to be off, out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehub.api import EvalContext, EvalDataset, Measurement, Subject
from saehub.data.order import permutation
from saehub.errors import SaehubError, StageFailed
from saehub_saebench.admission import bridge_of, refusal
from saehub_saebench.config import CoreConfig
from saehub_saebench.definitions import BY_EVALUATOR
from saehub_saebench.evaluator import BenchEvaluator, words
from saehub_saebench.isolation import private_folder, seed_everything, untouched_world
from saehub_saebench.lockstep import Lockstep, SharedModel
from saehub_saebench.rows import Place, Scores, library_version, measurements
from saehub_saebench.sae import BenchSAE


class TokenStore:
    """What core asks of SAELens' ActivationsStore: batches of tokens, here the hub's own packed sequences."""

    def __init__(self, dataset: EvalDataset, chosen_S: np.ndarray, batch: int, device: str, model: SharedModel):
        self.tokens, self.chosen_S, self.device, self.model = dataset.tokens, chosen_S, device, model
        self.context_size: int = dataset.tokens.context
        self.store_batch_size_prompts = batch
        self._next = 0

    def get_batch_tokens(self, n: int) -> Tensor:
        """int64 [n, context]."""
        self.model.next_batch()
        picked = self.chosen_S[self._next : self._next + n]
        self._next += n
        return torch.cat([self.tokens.tokens(int(i), int(i) + 1) for i in picked]).to(self.device)

    def reset_input_dataset(self) -> None:
        """From the first sequence again."""
        self.model.next_stage()
        self._next = 0


class Corrected:
    """What SAEBench gets wrong, from the same rows and reconstructions, in float64.

        explained variance = 1 - Σ‖x-x̂‖² / (Σ‖x‖² - n‖x̄‖²)      mse = Σ‖x-x̂‖² / (n d)      KL = Σ_v p_v (log p_v - log q_v)
    """

    def __init__(self, ignored: set[int]):
        self.ignored = torch.tensor(sorted(ignored), dtype=torch.long)
        self.rows, self.error, self.squares, self.width = 0, 0.0, 0.0, 1
        self.sum_D: Tensor | None = None
        self.kl = {"sae": [0.0, 0], "zero": [0.0, 0]}

    def keep(self, tokens_BT: Tensor) -> Tensor:
        """bool [B, T]: rows that SAEBench counts."""
        return ~torch.isin(tokens_BT, self.ignored.to(tokens_BT.device))

    def add(self, x_BTD: Tensor, y_BTD: Tensor, keep_BT: Tensor) -> None:
        """Reconstructions of one batch."""
        kept_N = keep_BT.flatten()
        x_ND = x_BTD.reshape(len(kept_N), -1)[kept_N].double()
        y_ND = y_BTD.reshape(len(kept_N), -1)[kept_N].double()
        self.rows, self.width = self.rows + len(x_ND), x_ND.shape[1]
        self.error += float((x_ND - y_ND).square().sum())
        self.squares += float(x_ND.square().sum())
        self.sum_D = x_ND.sum(0) + (0 if self.sum_D is None else self.sum_D)

    def add_kl(self, which: str, clean_BTV: Tensor, other_BTV: Tensor, keep_BT: Tensor) -> None:
        """KL(clean ‖ other) of one batch, over the rows that count."""
        logp_NV, logq_NV = (logits[keep_BT].float().log_softmax(-1) for logits in (clean_BTV, other_BTV))
        self.kl[which][0] += float((logp_NV.exp() * (logp_NV - logq_NV)).sum(dtype=torch.float64))
        self.kl[which][1] += len(logp_NV)

    def values(self) -> dict[str, float]:
        """The corrected metrics."""
        total = self.squares - self.rows * float((self.sum_D / self.rows).square().sum()) if self.rows else float("nan")
        (sae, n), (zero, m) = self.kl["sae"], self.kl["zero"]
        return {
            "explained_variance_corrected": 1 - self.error / total if total else float("nan"),
            "mse_corrected": self.error / (self.rows * self.width) if self.rows else float("nan"),
            "kl_div_score_corrected": 1 - (sae / n) / (zero / m) if n and m and zero else float("nan"),
        }


class Core(BenchEvaluator):
    """`saebench/core`."""

    name = "core"

    def __init__(self, config: CoreConfig | None = None, share: bool = True):
        super().__init__(config or CoreConfig())
        self.share = share

    def metrics(self) -> list[str]:
        """All of core's."""
        return list(BY_EVALUATOR["core"])

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """All measurements, a row a metric and dataset."""
        reasons = {subject.id: refusal(subject, context, self.config) for subject in context.subjects}
        taken = [subject for subject in context.subjects if reasons[subject.id] is None]
        batches = {name: self._batches(dataset) for name, dataset in context.datasets.items()} if taken else {}
        found: dict[tuple[str, str], dict[int, Scores | Exception]] = {}
        notes: dict[str, str | None] = {}
        with untouched_world():
            model = bridge_of(context) if taken else None
            total = max(1, len(context.datasets) * len(self.config.seeds))
            for at, (name, dataset) in enumerate(context.datasets.items() if taken else ()):
                for part, seed in enumerate(self.config.seeds):
                    chosen_S = self._sequences(dataset, part)
                    for subject, score in self._score(context, taken, model, dataset, chosen_S, batches[name], seed, notes):
                        found.setdefault((subject.id, name), {})[seed] = score
                    done = (at * len(self.config.seeds) + part + 1) / total
                    context.emit({"progress": done, "text": f"{name}, seed {seed}"})
        rows = []
        for subject in context.subjects:
            for name, dataset in context.datasets.items():
                place = Place(self.name, subject, context, self.config.seeds, name, dataset.hash, notes.get(subject.id))
                rows += self._table(place, reasons[subject.id], found.get((subject.id, name), {}))
        return rows

    def _table(self, place: Place, reason: str | None, by_seed: dict[int, Scores | Exception]) -> list[Measurement]:
        if reason is not None:
            return place.missing(self.metrics(), reason)
        error = next((score for score in by_seed.values() if isinstance(score, Exception)), None)
        if error is not None:
            return place.missing(self.metrics(), words(error), "failed")
        return measurements(place, by_seed)

    def _batches(self, dataset: EvalDataset) -> tuple[int, int]:
        """(reconstruction, sparsity) batches under each seed; StageFailed where the text is too short."""
        config = self.config
        size, seeds = config.batch_size_prompts, len(config.seeds)
        there = dataset.tokens.n_sequences // seeds // size
        wanted = (config.n_eval_reconstruction_batches or max(there, 1), config.n_eval_sparsity_variance_batches or max(there, 1))
        if max(wanted) > there:
            need = max(wanted) * size * seeds * dataset.tokens.context
            raise StageFailed(
                f"saebench/core needs {max(wanted)} batches of {size} sequences for each of {seeds} seeds, and {dataset.name} gives {there}",
                where=f"data.eval.{dataset.name}",
                why=f"it holds {dataset.tokens.n_sequences:,} sequences of {dataset.tokens.context} tokens; no sequence is read under two seeds",
                fix=f"data.eval.{dataset.name}.tokens: {need:,}, or fewer batches, a smaller batch_size_prompts or fewer seeds",
            )
        return wanted

    def _sequences(self, dataset: EvalDataset, part: int) -> np.ndarray:
        """int64 [n]: the sequences of one seed; those of different seeds are disjoint."""
        n, parts = dataset.tokens.n_sequences, len(self.config.seeds)
        order_S = np.asarray(permutation(n, "saebench/core", *self.config.seeds))
        return order_S[part * n // parts : (part + 1) * n // parts]

    def _score(
        self,
        context: EvalContext,
        taken: list[Subject],
        model: Any,
        dataset: EvalDataset,
        chosen_S: np.ndarray,
        batches: tuple[int, int],
        seed: int,
        notes: dict[str, str | None],
    ) -> Iterable[tuple[Subject, Scores | Exception]]:
        """Scores of all SAEs under one seed, or what went wrong."""
        lockstep = Lockstep([subject.id for subject in taken]) if self.share and len(taken) > 1 else None

        def one(subject: Subject) -> Scores:
            sae = self.wrap(subject, context)
            notes[subject.id] = self.note(sae)
            return self._measure(context, SharedModel(model, subject.id, lockstep), sae, dataset, chosen_S, batches)

        identity = {"eval": "core", "tensors": [s.hash for s in taken], "config": asdict(self.config), "data": dataset.hash, "seed": seed}
        with private_folder(context.work_dir, **identity):
            seed_everything(seed)
            if lockstep is not None:
                results = lockstep.run({subject.id: (lambda subject=subject: one(subject)) for subject in taken})
            else:
                results = {subject.id: _caught(one, subject) for subject in taken}
        for subject in taken:
            result = results[subject.id]
            if isinstance(result, SaehubError) or (isinstance(result, BaseException) and not isinstance(result, Exception)):
                raise result
            yield subject, result

    def _measure(
        self, context: EvalContext, model: SharedModel, sae: BenchSAE, dataset: EvalDataset, chosen_S: np.ndarray, batches: tuple[int, int]
    ) -> Scores:
        from sae_bench.evals.core import main as core
        from sae_bench.evals.core.eval_config import CoreEvalConfig

        config, words_ = self.config, model.tokenizer
        sae.cfg.context_size = dataset.tokens.context
        ignored = {token for token in (words_.pad_token_id, words_.eos_token_id, words_.bos_token_id) if token is not None}
        ignored |= {int(token) for token in dataset.tokens.manifest["exclude_ids"]}
        corrected = Corrected(ignored)
        watched = _Watched(model, sae, corrected)
        store = TokenStore(dataset, chosen_S, config.batch_size_prompts, context.device, model)
        settings = CoreEvalConfig(
            model_name=sae.cfg.model_name,
            llm_dtype=str(sae.dtype).removeprefix("torch."),
            batch_size_prompts=config.batch_size_prompts,
            n_eval_reconstruction_batches=batches[0],
            n_eval_sparsity_variance_batches=batches[1],
            dataset=dataset.name,
            context_size=dataset.tokens.context,
            exclude_special_tokens_from_reconstruction=config.exclude_special_tokens_from_reconstruction,
            **{f"compute_{what}": True for what in (
                "kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics", "featurewise_weight_based_metrics",
            )},
        )  # fmt: skip
        scalars, features = core.run_evals(sae, store, watched, settings, ignore_tokens=ignored)
        scalars = dict(scalars) | {"misc_metrics": core.calculate_misc_metrics(features)}
        flat = {metric: float(value) for group, found in scalars.items() if group != "token_stats" for metric, value in found.items()}
        reasons = {}
        if flat["kl_div_score"] != flat["kl_div_score"]:
            told = "SAEBench's log of a softmax underflowed to NaN, which it publishes as -1; see kl_div_score_corrected"
            reasons = dict.fromkeys(("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"), told)
        path = Path.cwd() / f"core-{model.who}.json".replace("/", "_")
        clean = core.replace_nans_with_negative_one(
            {"metrics": scalars, "feature_metrics": features, "eval_cfg": settings, "sae_id": "custom_sae", "sae_set": model.who}
        )
        core.save_single_eval_result(
            clean, core.get_eval_uuid(), core.get_sae_lens_version(), f"sae-bench {library_version()}", str(path), sae
        )
        if not path.is_file():
            raise StageFailed("SAEBench core wrote no result", where=model.who)
        return Scores({**flat, **corrected.values()}, reasons, json.loads(path.read_text()))


class _Watched:
    """The model of one SAE, with the corrected sums taken on the way."""

    def __init__(self, model: SharedModel, sae: BenchSAE, corrected: Corrected):
        self._model, self._sae, self._corrected = model, sae, corrected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: Tensor, **options: Any) -> Any:
        self._sae.watch = None
        return self._model(tokens, **options)

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = (), **options: Any) -> Any:
        result = self._model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **options)
        which = "zero" if getattr(fwd_hooks[0][1], "__name__", "") == "standard_zero_ablate_hook" else "sae"
        if self._model.clean is not None:
            self._corrected.add_kl(which, self._model.clean[0], result[0], self._corrected.keep(tokens))
        return result

    def run_with_cache(self, tokens: Tensor, **options: Any) -> Any:
        keep_BT = self._corrected.keep(tokens)
        self._sae.watch = lambda x, _f, y: self._corrected.add(x, y, keep_BT)
        return self._model.run_with_cache(tokens, **options)


def _caught(task: Any, subject: Subject) -> Any:
    try:
        return task(subject)
    except Exception as error:
        return error
