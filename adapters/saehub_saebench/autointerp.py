"""SAEs, a model, packed text and a judge behind an OpenAI-compatible address in; judged interpretability, as SAEBench scores it and with true labels, out."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehub.api import EvalContext, EvalDataset
from saehub.errors import StageFailed
from saehub_saebench.config import AutointerpConfig
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.lacking import judge
from saehub_saebench.output import plain, provenance
from saehub_saebench.rows import Scores
from saehub_saebench.sae import BenchSAE

NULL = "no judge was asked: no latent has enough examples"


class Autointerp(BenchEvaluator):
    """`saebench/autointerp`, on the hub's own sequences. SAEBench asks for `gpt-4o-mini` by name, whatever stands behind the address."""

    name = "autointerp"
    remembers = True

    def __init__(self, config: AutointerpConfig | None = None):
        super().__init__(config or AutointerpConfig())

    def metrics(self) -> list[str]:
        """Its score and the corrected one."""
        return ["autointerp_score", "autointerp_std_dev", "autointerp_score_corrected", "autointerp_mislabelled", "autointerp_judged"]

    def check(self, context: EvalContext) -> None:
        """A judge that can be asked, and sequences that are long enough."""
        if not os.environ.get(self.config.api_key_env):
            raise StageFailed(
                f"saebench/autointerp needs a judge, and {self.config.api_key_env} is not set",
                fix=judge(self.config.api_key_env),
            )
        for dataset in context.datasets.values():
            if dataset.tokens.context <= 2 * self.config.buffer + 1:
                raise StageFailed(
                    f"sequences of {dataset.name} have {dataset.tokens.context} tokens; windows need more than {2 * self.config.buffer + 1}",
                    fix=f"with: {{buffer: {max(1, (dataset.tokens.context - 2) // 4)}}}, or a longer context",
                )

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """One SAE on every dataset."""
        if self.config.base_url:
            os.environ["OPENAI_BASE_URL"] = self.config.base_url  # put back with the rest of the environment
        return {(name, dataset.hash): self._judge(sae, model, seed, dataset, context) for name, dataset in context.datasets.items()}

    def _judge(self, sae: BenchSAE, model: Any, seed: int, dataset: EvalDataset, context: EvalContext) -> Scores:
        from sae_bench.evals.autointerp import eval_output as out
        from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
        from sae_bench.sae_bench_utils.activation_collection import get_feature_activation_sparsity

        from saehub_saebench.isolation import seed_everything

        tokens_ST = dataset.tokens.tokens(0, dataset.tokens.n_sequences).to(context.device)
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("seeds", "base_url", "api_key_env")}
        config = AutoInterpEvalConfig(
            **settings, model_name=sae.cfg.model_name, random_seed=seed, dataset_name=dataset.name, llm_context_size=dataset.tokens.context,
            total_tokens=tokens_ST.numel(), llm_dtype=str(sae.dtype).removeprefix("torch."),
        )  # fmt: skip
        seed_everything(seed)
        where = (model, sae, config.llm_batch_size, sae.cfg.hook_layer, sae.cfg.hook_name)
        with torch.no_grad():
            sparsity_F = get_feature_activation_sparsity(tokens_ST, *where, mask_bos_pad_eos_tokens=True)
            judge = _watched()(config, model, sae, tokens_ST, sparsity_F, context.device, os.environ[self.config.api_key_env])
            if not judge.latents:
                return Scores(dict.fromkeys(self.metrics()), dict.fromkeys(self.metrics(), NULL))
            found = asyncio.run(judge.run())
        if not found:
            return Scores(dict.fromkeys(self.metrics()), dict.fromkeys(self.metrics(), NULL if not judge.asked else "no answer of the judge could be read"))
        scores = torch.tensor([found[latent]["score"] for latent in sorted(found)])
        values = {"autointerp_score": float(scores.mean()), "autointerp_std_dev": float(scores.std()) if len(scores) > 1 else float("nan")}
        values |= judge.corrected(found) | {"autointerp_judged": len(found) / len(judge.latents)}
        result = out.AutoInterpEvalOutput(
            eval_config=config,
            eval_result_metrics=out.AutoInterpMetricCategories(
                autointerp=out.AutoInterpMetrics(autointerp_score=values["autointerp_score"], autointerp_std_dev=values["autointerp_std_dev"])
            ),
            eval_result_details=[],
            eval_result_unstructured={str(latent): found[latent] for latent in sorted(found)},
            **provenance(sae),
        )
        return Scores(values, {"autointerp_std_dev": "one latent"}, plain(result))


def _watched() -> type:
    from sae_bench.evals.autointerp.main import AutoInterp
    from sae_bench.sae_bench_utils import activation_collection

    class Watched(AutoInterp):
        """SAEBench's judge, keeping the examples it asks about."""

        asked: dict[int, Any] = {}

        def gather_data(self) -> Any:
            generation, self.asked = super().gather_data()
            return generation, self.asked

        def corrected(self, found: dict[int, dict[str, Any]]) -> dict[str, float]:
            """The judge's answers against what the latents do: SAEBench says of every random window that its latent is silent there.

            A window is looked up by its tokens; of equal windows the first one stands for all.
            """
            windows = Windows(self.tokenized_dataset.cpu().numpy(), 2 * self.cfg.buffer + 1)
            latents = sorted(found)
            where = (self.tokenized_dataset, self.model, self.sae, self.cfg.llm_batch_size, self.sae.cfg.hook_layer, self.sae.cfg.hook_name)
            acts_STK: Tensor = activation_collection.collect_sae_activations(
                *where, mask_bos_pad_eos_tokens=True, selected_latents=latents, activation_dtype=torch.bfloat16
            )
            right, total, wrong, negatives = 0, 0, 0, 0
            for k, latent in enumerate(latents):
                said = set(found[latent]["predictions"])
                for number, example in enumerate(self.asked[latent], start=1):
                    active = example.is_active
                    if not active:
                        s, t = windows.find(example.toks)
                        active = bool((acts_STK[s, t : t + windows.length, k].float() > example.act_threshold).any())
                        negatives, wrong = negatives + 1, wrong + active
                    right, total = right + ((number in said) == active), total + 1
            return {"autointerp_score_corrected": right / total, "autointerp_mislabelled": wrong / max(negatives, 1)}

    return Watched


class Windows:
    """Where a run of tokens stands in a corpus [S, T]: a rolling hash, sorted once, and the tokens compared."""

    BASE = np.uint64(1_000_003)

    def __init__(self, tokens_ST: np.ndarray, length: int):
        self.tokens_ST, self.length = tokens_ST, length
        windows_SWL = np.lib.stride_tricks.sliding_window_view(tokens_ST.astype(np.uint64), length, axis=1)
        self.width = windows_SWL.shape[1]
        hashes_N = self._hash(windows_SWL).reshape(-1)
        self.order_N = np.argsort(hashes_N, kind="stable")
        self.sorted_N = hashes_N[self.order_N]

    def _hash(self, windows: np.ndarray) -> np.ndarray:
        total = np.zeros(windows.shape[:-1], dtype=np.uint64)
        for at in range(self.length):
            total = total * self.BASE + windows[..., at]
        return total

    def find(self, tokens: list[int]) -> tuple[int, int]:
        """(sequence, position) of the first window with these tokens; LookupError where there is none."""
        key = self._hash(np.asarray(tokens, dtype=np.uint64))
        at = int(np.searchsorted(self.sorted_N, key))
        while at < len(self.sorted_N) and self.sorted_N[at] == key:
            s, t = divmod(int(self.order_N[at]), self.width)
            if self.tokens_ST[s, t : t + self.length].tolist() == list(tokens):
                return s, t
            at += 1
        raise LookupError("a window of the corpus was not found in it")
