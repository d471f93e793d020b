"""SAEs and text in; for each, the share of a row's activation that its strongest latents carry, with a standard error, out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saehub import Measurement
from saehub.api import EvalContext, EvalDataset, Subject
from saehub_example.evaluate_config import DominanceConfig


class Dominance:
    """Implements `saehub.api.Evaluator`.

        dominance = mean over kept rows with any active latent of Σ_{i in top} |f_i| / Σ_i |f_i|

    A value of 1 means that one latent says everything about a row; 1/L0 that all say equally much. Rows of one sequence are not
    independent, so the standard error is over the means of sequences.
    """

    def __init__(self, config: DominanceConfig):
        self.config = config

    def evaluate(self, context: EvalContext) -> Iterator[Measurement]:
        """One row a subject and dataset; `not_measured`, with the reason, where an SAE does not fit its site."""
        for subject in context.subjects:
            for dataset in context.datasets.values():
                yield self._measure(subject, dataset, context)

    def _measure(self, subject: Subject, dataset: EvalDataset, context: EvalContext) -> Measurement:
        known = {
            "metric": f"dominance@{self.config.top}",
            "definition": "example.dominance/1",
            "evaluator": "example/dominance",
            "subjects": (subject.id,),
            "subject_hashes": (subject.hash,),
            "site": subject.site,
            "dataset": dataset.name,
            "dataset_hash": dataset.hash,
            "seed": context.seed,
        }
        found: dict[int, list[float]] = {}
        for rows in context.rows(dataset, [subject.site]):
            x_ND = rows.acts[subject.site]
            if x_ND.shape[1] != subject.sae.config.d_in:
                reason = f"the SAE reads {subject.sae.config.d_in} numbers a row, {subject.site} has {x_ND.shape[1]}"
                return Measurement(value=None, status="not_measured", reason=reason, **known)
            for sequence, share in self._shares(subject, x_ND, rows.keep_N, rows.sequences_N):
                found.setdefault(sequence, []).append(share)
        if len(found) < 2:
            return Measurement(value=None, status="not_measured", reason=f"{len(found)} sequences with an active latent; 2 are needed", **known)
        means = torch.tensor([sum(shares) / len(shares) for shares in found.values()], dtype=torch.float64)
        return Measurement(value=float(means.mean()), stderr=float(means.std() / len(means) ** 0.5), n=len(means), **known)

    def _shares(self, subject: Subject, x_ND: torch.Tensor, keep_N: torch.Tensor, sequences_N: torch.Tensor) -> Iterator[tuple[int, float]]:
        for start in range(0, len(x_ND), 256):  # a few rows at a time: dense features are wide
            with torch.no_grad():
                f_NF = subject.sae.encode(x_ND[start : start + 256]).abs().double()
            total_N = f_NF.sum(1)
            share_N = f_NF.topk(min(self.config.top, f_NF.shape[1]), dim=1).values.sum(1) / total_N
            kept_N = keep_N[start : start + 256] & (total_N > 0)
            yield from zip(sequences_N[start : start + 256][kept_N].tolist(), share_N[kept_N].tolist(), strict=True)
