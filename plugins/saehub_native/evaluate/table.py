"""Sums by sequence of one SAE on one dataset in; its measurements, each with error, definition and the parts that it came from, out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saehub.api import EvalDataset, Measurement, Subject
from saehub_native.evaluate import deadness
from saehub_native.evaluate.accumulate import SequenceSums
from saehub_native.evaluate.config import CoreConfig
from saehub_native.evaluate.definitions import DEFINITIONS, Definition, of_metric
from saehub_native.evaluate.metrics import NORMAL_95, Estimate, complement, explained_variance, log_histogram, ratio
from saehub_native.evaluate.subjects import SubjectRun

EVALUATOR = "native/core"


@dataclass
class Table:
    """The measurements of one SAE on one dataset, in the order they are added."""

    subject: Subject
    dataset: EvalDataset
    seed: int
    version: str
    unit: str = "sequences"
    rows: list[Measurement] = field(default_factory=list)
    evaluator: str = EVALUATOR
    find: Callable[[str], Definition] = of_metric
    """A metric's definition."""

    def _add(self, metric: str, value: float | None, **more: Any) -> None:
        known = self.find(metric)
        self.rows.append(
            Measurement(
                metric=metric,
                value=value,
                subjects=(self.subject.id,),
                subject_hashes=(self.subject.hash,),
                evaluator=self.evaluator,
                definition=known.id,
                site=self.subject.site,
                dataset=self.dataset.name,
                dataset_hash=self.dataset.hash,
                better=known.better,
                version=self.version,
                seed=self.seed,
                **{"unit_of_n": self.unit, **more},
            )
        )

    def estimate(self, metric: str, found: Estimate, note: str | None = None, parts: Mapping[str, Any] | None = None) -> None:
        """A ratio; failed where it is no finite number."""
        if not math.isfinite(found.value):
            total = float(found.denominator_S.sum())
            self.failed(metric, "its denominator is 0 on this dataset" if total == 0 else f"the value is {found.value}")
            return
        low, high = found.interval
        sums = {"numerator": found.numerator_S.tolist(), "denominator": found.denominator_S.tolist()}
        self._add(metric, found.value, stderr=found.stderr, ci_low=low, ci_high=high, n=found.n, note=note, parts={**sums, **(parts or {})})

    def share(
        self, metric: str, value: float, stderr: float | None, n: int, note: str | None, parts: Mapping[str, Any], unit: str | None = None
    ) -> None:
        """A share between 0 and 1 with an error of its own; its interval is cut to 0..1. `unit`: of n, where it is not the table's."""
        wide = NORMAL_95 * stderr if stderr is not None else None
        low, high = (None, None) if wide is None else (max(0.0, value - wide), min(1.0, value + wide))
        self._add(metric, value, stderr=stderr, ci_low=low, ci_high=high, n=n, note=note, parts=parts, unit_of_n=unit or self.unit)

    def failed(self, metric: str, reason: str) -> None:
        """No number, because something is wrong."""
        self._add(metric, None, status="failed", reason=reason)

    def missing(self, metric: str, reason: str, parts: Mapping[str, Any] | None = None) -> None:
        """No number, because this cannot be measured here."""
        self._add(metric, None, status="not_measured", reason=reason, parts=parts or {})


RECONSTRUCTION = ("fvu", "explained_variance", "mse", "cosine", "l0", "l1")


def dead_shares(config: CoreConfig) -> dict[str, float]:
    """Metric -> r0: the configured rate, then the standing ones."""
    return {"dead_share": config.dead_rate} | {f"dead_share@{rate:.0e}": rate for rate in deadness.RATES if rate != config.dead_rate}


def firing_metrics(config: CoreConfig) -> tuple[str, ...]:
    """Everything that `firing` adds."""
    return (*dead_shares(config), "never_fired_share", "feature_density")


def reconstruction(table: Table, run: SubjectRun) -> None:
    """FVU, explained variance, MSE, cosine, L0, L1."""
    sums, rows_S = run.sums, run.sums["rows"]
    width = run.sae.config.d_out
    table.estimate("fvu", ratio(sums["squared_error"], sums["squared_total"]))
    table.estimate("explained_variance", explained_variance(sums))
    table.estimate("mse", ratio(sums["squared_error"], rows_S * width))
    for metric in ("cosine", "l0", "l1"):
        table.estimate(metric, ratio(sums[metric], rows_S))


SHARED_LOSSES = ("ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean")
"""Of the model and the site alone: no SAE enters them."""
OWN_LOSSES = ("ce_spliced", "kl_spliced", "ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean")


def recovered(site: SequenceSums, ce_S: np.ndarray, kl_S: np.ndarray | None = None) -> dict[str, Estimate]:
    """The four recovered shares (the two of CE where no KL is given) of an intervention, from the site's own losses and its."""
    found = {f"ce_recovered_{kind}": ratio(site[f"ce_{kind}"] - ce_S, site[f"ce_{kind}"] - site["ce_clean"]) for kind in ("zero", "mean")}
    if kl_S is not None:
        found |= {f"kl_recovered_{kind}": complement(ratio(kl_S, site[f"kl_{kind}"])) for kind in ("zero", "mean")}
    return found


def shared_losses(table: Table, site: SequenceSums, note: str | None) -> None:
    """The clean model's cross-entropy and what both ablations make of it."""
    for metric in SHARED_LOSSES:
        table.estimate(metric, ratio(site[metric], site["positions"]), note)


def _unclear(site: SequenceSums, metric: str) -> tuple[str | None, dict[str, Any]]:
    """(A caveat, `clear: false` for the parts) where ablation hardly hurts: a share of a gap that is not clear of 0 means nothing."""
    loss, _, rest = metric.partition("_recovered_")
    kind = rest.partition("_")[0]
    gap = ratio(site[f"{loss}_{kind}"] - (site["ce_clean"] if loss == "ce" else 0), site["positions"])
    if gap.stderr is not None and gap.value > 3 * gap.stderr:
        return None, {}
    return f"{kind}-ablation costs {gap.value:.3g} ± {gap.stderr or float('nan'):.2g} nats: too little for a share of it to mean much", {"clear": False}


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def own_losses(table: Table, site: SequenceSums, run: SubjectRun, note: str | None) -> None:
    """Cross-entropy and KL with the SAE spliced in, and the shares recovered."""
    for metric in ("ce_spliced", "kl_spliced"):
        table.estimate(metric, ratio(run.sums[metric], site["positions"]), note)
    for metric, found in recovered(site, run.sums["ce_spliced"], run.sums["kl_spliced"]).items():
        why, parts = _unclear(site, metric)
        table.estimate(metric, found, _joined(note, why), parts)


def firing(table: Table, run: SubjectRun, config: CoreConfig) -> None:
    """Dead shares at every rate, the share that never fired, and the density histogram."""
    fired_F, sequences_F, last_F = run.firing_arrays()
    looked_at = np.flatnonzero(run.sums["rows"])
    watched = deadness.budget(fired_F, sequences_F, run.firing.rows, len(looked_at))
    share, stderr, alone_S = deadness.silent_share(sequences_F, last_F, looked_at)
    parts = {
        "silent": int((sequences_F == 0).sum()), "latents": run.latents, "rows": watched.rows, "effective_tokens": watched.tokens,
        "burst": watched.burst, "burst_latents": watched.latents, "bound": watched.bound,
    }  # fmt: skip
    budget = f"N = {watched.tokens:,.0f} effective tokens of {watched.rows:,} rows: the 95 % bound on a silent latent's rate is {watched.bound:.2g}"
    for metric, rate in dead_shares(config).items():
        if not parts["silent"]:  # nothing is left to decide
            table.share(metric, share, stderr, len(looked_at), f"every latent fired, so none is dead at r0 = {rate:g}", parts)
        elif watched.decides(rate):
            table.share(metric, share, stderr, len(looked_at), f"r0 = {rate:g}; {budget}", parts)
        else:
            table.missing(metric, watched.undecided(rate), parts)
    table.share("never_fired_share", share, stderr, len(looked_at), budget, {**parts, "only_in_sequence": alone_S.tolist()})
    rates_F = fired_F / max(run.firing.rows, 1)
    density = ratio(run.sums["l0"], run.sums["rows"] * run.latents)
    table.estimate("feature_density", density, parts={"histogram": log_histogram(rates_F, config.histogram_bins)})


def baseline(table: Table, name: str, sums: SequenceSums, site: SequenceSums, k: int, loss_reason: str | None, note: str | None) -> None:
    """FVU and CE recovered of one baseline; `k` is 0 where it has none."""
    at = f"k = {k}" if k else None
    table.estimate(f"fvu_{name}", ratio(sums["squared_error"], sums["squared_total"]), at)
    for metric in ("ce_recovered_zero", "ce_recovered_mean"):
        if loss_reason:
            table.missing(f"{metric}_{name}", loss_reason)
        else:
            why, parts = _unclear(site, metric)
            table.estimate(f"{metric}_{name}", recovered(site, sums["ce"])[metric], _joined(at, note, why), parts)


def ordered(rows: list[Measurement]) -> list[Measurement]:
    """In the order of the definitions, each baseline after the metric that it belongs to."""
    order = {id: position for position, id in enumerate(DEFINITIONS)}
    return sorted(rows, key=lambda row: order[row.definition])
