"""SAEs in; how they fare on another kind of text, or at the same site of another (a later, a chat) model, out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from saehub.api import EvalContext, EvalDataset, Measurement, Subject
from saehub.data.model import ModelHandle, tokenizer_hash
from saehub.errors import SaehubError, StageFailed
from saehub_native.evaluate.metrics import ratio
from saehub_native.evaluate.robust.config import DriftConfig
from saehub_native.evaluate.robust.definitions import BY_METRIC
from saehub_native.evaluate.robust.reading import Readers, measure

EVALUATOR, FIRST, GROUPS = "native/drift", "in_sample", 10
MODEL_METRICS = ("drift_overlap_model", "drift_fvu", "drift_fvu_model", "drift_l0", "drift_l0_model")


class DriftEvaluator:
    """`native/drift`: firing rates across datasets, and fidelity and active latents in another model, where one is named."""

    def __init__(self, config: DriftConfig | None = None):
        self.config = config or DriftConfig()

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """Rows for every SAE; what cannot be measured says why."""
        if context.model is None or not context.datasets:
            raise StageFailed(f"{EVALUATOR} needs a model and a dataset", fix="data.eval: {in_sample: {source: …}}")
        with torch.no_grad():
            return list(_Drift(self.config, context).run())


class _Drift:
    def __init__(self, config: DriftConfig, context: EvalContext):
        self.config, self.context, self.readers = config, context, Readers(context)
        names = list(context.datasets)
        self.first = context.datasets[FIRST if FIRST in names else names[0]]

    def run(self) -> Iterator[Measurement]:
        counts = {name: self._firing(dataset) for name, dataset in self.context.datasets.items()}
        for subject in self.context.subjects:
            yield from self._rates(subject, counts)
        yield from self._other_model()

    def _batches(self, dataset: EvalDataset) -> Iterator[tuple[int, int]]:
        last = min(self.config.sequences, dataset.tokens.n_sequences)
        for i in range(0, last, self.context.lm_batch):
            yield i, min(i + self.context.lm_batch, last)

    # ------------------------------------------------------------------ other text
    def _firing(self, dataset: EvalDataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """SAE id -> (firings [S, F] of each sequence, kept rows [S])."""
        found: dict[str, tuple[list, list]] = {subject.id: ([], []) for subject in self.context.subjects}
        for i, j in self._batches(dataset):
            rows, keep_BT = self.readers.rows(self.context.model, dataset.tokens.tokens(i, j)), dataset.tokens.keep(i, j)
            for subject in self.context.subjects:
                acts_BTF = self.readers.encode(subject, rows[subject.site])
                if acts_BTF is not None:
                    fired_BTF = (acts_BTF != 0) & keep_BT.to(acts_BTF.device)[:, :, None]
                    found[subject.id][0].append(fired_BTF.sum(1).cpu().numpy())
                    found[subject.id][1].append(keep_BT.sum(1).numpy())
            self.context.emit({"progress": 0.5, "text": f"{dataset.name}: firing rates, {j:,} sequences"})
        return {name: (np.concatenate(fired), np.concatenate(rows)) for name, (fired, rows) in found.items() if fired}

    def _rates(self, subject: Subject, counts: dict[str, dict]) -> Iterator[Measurement]:
        for name, dataset in self.context.datasets.items():
            null = name == self.first.name
            metric = "drift_rate_correlation_null" if null else "drift_rate_correlation"
            where = {"dataset": name, "dataset_hash": dataset.hash}
            own = counts[name].get(subject.id)
            reference = counts[self.first.name].get(subject.id)
            reason = self.readers.broken.get(subject.id)
            if reason is None and (own is None or reference is None or len(own[1]) < 4):
                reason = f"{name} has fewer than four sequences"
            if reason:
                yield measure(BY_METRIC[metric], EVALUATOR, metric, subject, None, status="not_measured", reason=reason, **where)
                continue
            fired_SF, rows_S = own
            if null:
                reference, (fired_SF, rows_S) = (fired_SF[::2], rows_S[::2]), (fired_SF[1::2], rows_S[1::2])
            value, stderr = correlation(reference[0].sum(0) / max(reference[1].sum(), 1), fired_SF, rows_S)
            if value is None:
                reason = "fewer than three latents fire, or all equally often"
                yield measure(BY_METRIC[metric], EVALUATOR, metric, subject, None, status="not_measured", reason=reason, **where)
                continue
            note = f"against {'the other half of ' if null else ''}{self.first.name}, {len(rows_S):,} sequences"
            yield measure(BY_METRIC[metric], EVALUATOR, metric, subject, value, stderr=stderr, n=len(rows_S), unit_of_n="sequences", note=note, **where)

    # ------------------------------------------------------------------ another model
    def _other_model(self) -> Iterator[Measurement]:
        where = {"dataset": self.first.name, "dataset_hash": self.first.hash}
        try:
            other, reason = (None, "no other model was named (model: …)") if self.config.model is None else self._load()
        except SaehubError as error:
            other, reason = None, str(error).splitlines()[0]
        sums: dict[str, dict[str, np.ndarray]] = self._sums(other) if other is not None else {}
        for subject in self.context.subjects:
            why = reason or self.readers.broken.get(subject.id)
            if why is None and subject.id not in sums:
                why = "it could not be read"
            if why is None and not subject.sae.row_wise:
                why = "its architecture is not row-wise"
            for metric in MODEL_METRICS:
                if why:
                    yield measure(BY_METRIC[metric], EVALUATOR, metric, subject, None, status="not_measured", reason=why, **where)
                    continue
                own = sums[subject.id]
                top, bottom = {
                    "drift_overlap_model": (own["overlap"], own["rows_fired"]),
                    "drift_fvu": (own["error"], own["total"]),
                    "drift_fvu_model": (own["error_model"], own["total_model"]),
                    "drift_l0": (own["l0"], own["rows"]),
                    "drift_l0_model": (own["l0_model"], own["rows"]),
                }[metric]
                found = ratio(top, bottom)
                if not np.isfinite(found.value):
                    yield measure(BY_METRIC[metric], EVALUATOR, metric, subject, None, status="not_measured", reason="nothing fires, or the rows do not vary", **where)
                    continue
                parts = {"numerator": top.tolist(), "denominator": bottom.tolist()}
                note = f"other model: {self.config.model}"
                yield measure(BY_METRIC[metric], EVALUATOR, metric, subject, found.value, stderr=found.stderr, n=found.n, note=note if found.stderr is not None else f"{note}; one sequence", parts=parts, **where)

    def _load(self) -> tuple[ModelHandle | None, str | None]:
        """The other model, or why its rows cannot be compared."""
        mine = self.context.model
        spec = replace(mine.spec, name=self.config.model, revision=self.config.revision)
        if tokenizer_hash(spec) != tokenizer_hash(mine.spec):
            return None, f"{spec.name} has another tokenizer: its tokens are not the same tokens"
        other = ModelHandle.load(spec, tokenizer=False)
        if other.shape.d_model != mine.shape.d_model or other.shape.n_layers != mine.shape.n_layers:
            return None, f"{spec.name} has {other.shape.n_layers} layers of width {other.shape.d_model}, {mine.spec.name} {mine.shape.n_layers} of {mine.shape.d_model}"
        return other, None

    def _sums(self, other: ModelHandle) -> dict[str, dict[str, np.ndarray]]:
        """SAE id -> sums by sequence; means of the rows (for FVU) come from a first pass."""
        models = {"": self.context.model, "_model": other}
        means: dict[tuple[str, str], torch.Tensor] = {}
        for end, model in models.items():
            totals, n = dict.fromkeys(self.readers.sites, 0), 0
            for i, j in self._batches(self.first):
                keep_BT, rows = self.first.tokens.keep(i, j), self.readers.rows(model, self.first.tokens.tokens(i, j))
                totals = {site: totals[site] + rows[site].cpu()[keep_BT].double().sum(0) for site in totals}
                n += int(keep_BT.sum())
            means |= {(site, end): total / max(n, 1) for site, total in totals.items()}
        found: dict[str, dict[str, list]] = {}
        for i, j in self._batches(self.first):
            tokens_BT, keep_BT = self.first.tokens.tokens(i, j), self.first.tokens.keep(i, j)
            rows = {end: self.readers.rows(model, tokens_BT) for end, model in models.items()}
            for subject in self.context.subjects:
                self._add(subject, rows, keep_BT, means, found)
            self.context.emit({"progress": 0.9, "text": f"{self.config.model}: {j:,} sequences"})
        return {name: {key: np.concatenate(parts) for key, parts in own.items()} for name, own in found.items()}

    def _add(self, subject: Subject, rows: dict, keep_BT: torch.Tensor, means: dict, found: dict) -> None:
        target, active, sums = subject.target_site or subject.site, {}, {"rows": keep_BT.sum(1).double()}
        for end in ("", "_model"):
            acts_BTF = self.readers.encode(subject, rows[end][subject.site])
            if acts_BTF is None or not subject.sae.row_wise:
                return
            x_BTD, y_BTD = rows[end][subject.site].to(acts_BTF.device), rows[end][target].cpu().double()
            yhat_BTD = self.readers.saes[subject.id].decode(acts_BTF, like=x_BTD).cpu().double()
            active[end] = (acts_BTF != 0).cpu()
            sums[f"error{end}"] = ((y_BTD - yhat_BTD).square().sum(2) * keep_BT).sum(1)
            sums[f"total{end}"] = ((y_BTD - means[target, end]).square().sum(2) * keep_BT).sum(1)
            sums[f"l0{end}"] = (active[end].sum(2) * keep_BT).sum(1).double()
        union_BT = (active[""] | active["_model"]).sum(2)
        some_BT = keep_BT & (union_BT > 0)
        sums["overlap"] = ((active[""] & active["_model"]).sum(2) / union_BT.clamp_min(1) * some_BT).sum(1).double()
        sums["rows_fired"] = some_BT.sum(1).double()
        own = found.setdefault(subject.id, {})
        for name, value_B in sums.items():
            own.setdefault(name, []).append(value_B.numpy())


def correlation(reference_F: np.ndarray, fired_SF: np.ndarray, rows_S: np.ndarray) -> tuple[float | None, float | None]:
    """(Spearman's ρ of firing rates with `reference_F`, its delete-one-group jackknife error); (None, None) where it is not defined."""
    value = _spearman(reference_F, fired_SF.sum(0) / max(rows_S.sum(), 1))
    if value is None:
        return None, None
    groups = min(GROUPS, len(rows_S))
    member_S = np.arange(len(rows_S)) % groups
    without = []
    for g in range(groups):
        rest = member_S != g
        without.append(_spearman(reference_F, fired_SF[rest].sum(0) / max(rows_S[rest].sum(), 1)))
    if any(one is None for one in without):
        return None, None
    spread = np.array(without) - np.mean(without)
    return value, float(np.sqrt((groups - 1) / groups * (spread**2).sum()))


def _spearman(a_F: np.ndarray, b_F: np.ndarray) -> float | None:
    """Pearson's correlation of ranks (ties share the mean rank), over entries that are not 0 in both."""
    from scipy.stats import rankdata

    some_F = (a_F > 0) | (b_F > 0)
    if some_F.sum() < 3:
        return None
    a, b = rankdata(a_F[some_F]), rankdata(b_F[some_F])
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
