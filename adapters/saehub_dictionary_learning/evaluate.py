"""SAEs, datasets and a language model in; what dictionary_learning's own `evaluate` and `loss_recovered` say about them out, under its names and definitions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saehub.api import Measurement
from saehub.sites import Site

if TYPE_CHECKING:
    from saehub.api import EvalContext, EvalDataset, Subject
    from saehub_dictionary_learning.evaluate_config import EvaluateConfig

ADDRESS = "dictionary_learning/evaluate"
BETTER = {
    "l2_loss": "lower",
    "l1_loss": "none",
    "l0": "none",
    "frac_variance_explained": "higher",
    "cossim": "higher",
    "l2_ratio": "none",
    "relative_reconstruction_bias": "none",
    "frac_alive": "higher",
    "loss_original": "none",
    "loss_reconstructed": "lower",
    "loss_zero": "none",
    "frac_recovered": "higher",
}
LOSSES = ("loss_original", "loss_reconstructed", "loss_zero", "frac_recovered")
ROWS = tuple(name for name in BETTER if name not in LOSSES)
DEFINITIONS = {
    "l2_loss": ("L2 distance", "mean over rows of ‖x - x̂‖₂"),
    "l1_loss": ("L1", "mean over rows of ‖f‖₁"),
    "l0": ("L0", "mean over rows of the number of latents that are not 0"),
    "frac_variance_explained": ("variance explained", "1 - Σ var(x - x̂) / Σ var(x), variances over one batch of rows, mean over batches"),
    "cossim": ("cosine", "mean over rows of cos(x, x̂)"),
    "l2_ratio": ("norm ratio", "mean over rows of ‖x̂‖ / ‖x‖"),
    "relative_reconstruction_bias": ("reconstruction bias", "mean ‖x̂‖² / mean x·x̂ (Rajamanoharan et al. 2024, eq. 10) of one batch, mean over batches"),
    "frac_alive": ("alive latents", "share of latents whose activations over all rows sum to something other than 0"),
    "loss_original": ("loss", "cross-entropy of the model, mean over batches of text"),
    "loss_reconstructed": ("loss with x̂", "cross-entropy with x̂ in place of x at every position (BOS too)"),
    "loss_zero": ("loss with 0", "cross-entropy with 0 in place of x, at BOS too (saehub's own cross-entropies leave it as it is)"),
    "frac_recovered": ("loss recovered", "(loss_reconstructed - loss_zero) / (loss_original - loss_zero) of one batch of text, mean over batches"),
}
"""Metric -> title, formula."""


class Dictionary(nn.Module):
    """An SAE as the library calls one: `d(x) -> x̂`, `d(x, output_features=True) -> (x̂, f)`, `dict_size`, `activation_dim`."""

    def __init__(self, sae: Any):
        super().__init__()
        self.sae, self.dict_size, self.activation_dim = sae, sae.config.d_sae, sae.config.d_in
        self.fired_F = torch.zeros(self.dict_size)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """Rows [..., d] to x̂ [..., d], and features [..., dict_size]."""
        f = self.sae.encode(x)
        x_hat = self.sae.decode(f, like=x)
        if not output_features:
            return x_hat
        self.fired_F += f.reshape(-1, self.dict_size).float().sum(0).cpu()
        return x_hat, f


class EvaluateEvaluator:
    """`dictionary_learning/evaluate`: one call of the library a batch, so that a standard error over batches comes with each of its means."""

    def __init__(self, config: EvaluateConfig):
        self.config = config

    def evaluate(self, context: EvalContext) -> Iterator[Measurement]:
        """Every metric of the library, for each SAE on each dataset."""
        from saehub_dictionary_learning.library import LIBRARY

        evaluate = LIBRARY.take("dictionary_learning.evaluation:evaluate", parameters=["dictionary", "activations", "device", "n_batches"])
        total, done = max(1, len(context.subjects) * len(context.datasets)), 0
        for dataset in context.datasets.values():
            for subject in context.subjects:
                context.emit({"progress": done / total, "text": f"{subject.id} on {dataset.name}"})
                about = {"subject": subject, "dataset": dataset, "seed": context.seed}
                reason = _refusal(subject)
                yield from self._rows(context, evaluate, about, reason)
                if self.config.loss_recovered:
                    yield from self._losses(context, about, reason)
                done += 1

    @torch.no_grad()
    def _rows(self, context: EvalContext, evaluate: Any, about: dict, reason: str | None) -> Iterator[Measurement]:
        subject, values = about["subject"], defaultdict(list)
        dictionary, used = Dictionary(subject.sae), 0
        batches = self._batches(context, about["dataset"], subject) if reason is None else ()
        for x_BD in batches:
            if x_BD.shape[1] != dictionary.activation_dim:
                reason = f"the SAE reads {dictionary.activation_dim} numbers a row, {subject.site} has {x_BD.shape[1]}"
                break
            used += x_BD.shape[0]
            for name, value in evaluate(dictionary, iter([x_BD]), device=context.device, n_batches=1).items():
                values[name].append(value)
        if reason is None and not used:
            reason = f"{about['dataset'].name} holds fewer than 2 rows"
        yield from (_row(name, values[name], about, reason, _unit(used, self.config.batch, "rows")) for name in ROWS if name != "frac_alive")
        alive = None if reason else float((dictionary.fired_F != 0).float().sum() / dictionary.dict_size)
        note = None if reason else f"over {used} rows: it grows with their number, and the library gives no standard error"
        yield _measurement("frac_alive", alive, about, reason, n=used or None, unit_of_n="rows", note=note)

    def _batches(self, context: EvalContext, dataset: EvalDataset, subject: Subject) -> Iterator[Tensor]:
        """Rows of the site in sequence order in batches of one size, however many sequences a forward pass takes; fewer rows than one batch are one."""
        waiting, held, given = [], 0, 0
        limit = self.config.max_rows or math.inf
        for rows in context.rows(dataset, [subject.site]):
            x_ND = rows.acts[subject.site][rows.keep_N.to(rows.acts[subject.site].device)].float()
            waiting.append(x_ND[: max(0, int(min(limit - given - held, x_ND.shape[0])))])
            held += waiting[-1].shape[0]
            while held >= self.config.batch:
                x_ND = torch.cat(waiting)
                yield x_ND[: self.config.batch]
                waiting, held, given = [x_ND[self.config.batch :]], held - self.config.batch, given + self.config.batch
            if given + held >= limit:
                break
        if not given and held >= 2:
            yield torch.cat(waiting)

    @torch.no_grad()
    def _losses(self, context: EvalContext, about: dict, reason: str | None) -> Iterator[Measurement]:
        subject, values = about["subject"], defaultdict(list)
        model, tokens = context.model, about["dataset"].tokens
        if reason is None and model is not None:
            width = Site.parse(subject.site).width(model.shape)
            if width is not None and width != subject.sae.config.d_in:
                reason = f"the SAE reads {subject.sae.config.d_in} numbers a row, {subject.site} has {width}"
        if reason is None:
            from saehub_dictionary_learning.library import LIBRARY
            from saehub_dictionary_learning.tracing import Traced

            take = LIBRARY.take("dictionary_learning.evaluation:loss_recovered", parameters=["text", "model", "submodule", "dictionary", "io"])
            count = min(tokens.n_sequences, self.config.loss_sequences or tokens.n_sequences)
            with Traced(model) as traced:
                module, io = traced.module(subject.site)
                for start in range(0, count, self.config.batch_size):
                    text_BT = tokens.tokens(start, min(start + self.config.batch_size, count)).to(context.device)
                    original, reconstructed, zero = (float(x) for x in take(text_BT, traced.model, module, Dictionary(subject.sae), io=io))
                    found = (original, reconstructed, zero, (reconstructed - zero) / (original - zero) if original != zero else math.nan)
                    for name, value in zip(LOSSES, found, strict=True):
                        values[name].append(value)
        count = 0 if reason else count
        yield from (_row(name, values[name], about, reason, _unit(count, self.config.batch_size, "sequences")) for name in LOSSES)


def _unit(count: int, batch: int, what: str) -> str:
    """What one of the numbers is that a mean is over: `batches of 32 sequences`, the last one perhaps smaller, or the one batch that there was."""
    if 0 < count <= batch:
        return f"batch of {count:,} {what}"
    return f"batches of {'up to ' if count % batch else ''}{batch:,} {what}"


def _refusal(subject: Subject) -> str | None:
    """Why the library's metrics do not apply to this SAE."""
    if subject.sae.config.kind != "autoencoder":
        return f"the library compares x̂ with the x that was read; this is a {subject.sae.config.kind}"
    if not subject.sae.row_wise:
        return "the library evaluates rows one by one; this architecture is not row-wise"
    return None


def _row(metric: str, values: list[float], about: dict, reason: str | None, unit: str) -> Measurement:
    """The mean over batches as the library takes it (a sum in order, divided), and the standard error of that mean."""
    if reason is not None or not values:
        return _measurement(metric, None, about, reason or "no batch")
    mean = sum(values) / len(values)
    if len(values) < 2:
        return _measurement(metric, mean, about, None, n=1, unit_of_n=unit, note="one batch: no standard error")
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return _measurement(metric, mean, about, None, n=len(values), unit_of_n=unit, stderr=deviation / math.sqrt(len(values)))


def _measurement(metric: str, value: float | None, about: dict, reason: str | None, **more: Any) -> Measurement:
    subject, dataset = about["subject"], about["dataset"]
    if reason is None and (value is None or not math.isfinite(value)):
        reason, value, status = f"the library computed {value}", None, "failed"
        more = {}
    else:
        status = "ok" if reason is None else "not_measured"
    return Measurement(
        metric=metric,
        value=value,
        subjects=(subject.id,),
        evaluator=ADDRESS,
        definition=f"dictionary_learning.{metric}/1",
        subject_hashes=(subject.hash,),
        site=subject.site,
        dataset=dataset.name,
        dataset_hash=dataset.hash,
        better=BETTER[metric],
        seed=about["seed"],
        status=status,
        reason=reason,
        **more,
    )
