"""Other evaluators' measurements in; one verdict an SAE with evidence, flags and what to check next, and the remaining out-of-sample shifts, out."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from saehub.api import EvalContext, Measurement, Subject
from saehub_native.health.deltas import deltas
from saehub_native.verdict.config import VerdictConfig
from saehub_native.verdict.definitions import WORDS
from saehub_native.verdict.evidence import IN, Evidence, gather
from saehub_native.verdict.rules import Judgement, judge

EVALUATOR = "native/verdict"
HEALTH = "native/health"


class VerdictEvaluator:
    """`native/verdict`: reads `EvalContext.measured`, runs no model."""

    def __init__(self, config: VerdictConfig | None = None):
        self.config = config or VerdictConfig()
        try:
            self.version = version("saehub")
        except PackageNotFoundError:
            self.version = ""

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """For each SAE `verdict`, `verdict_score`, and `out_minus_in@…` of every metric that others measured on two datasets."""
        found: list[Measurement] = []
        for subject in context.subjects:
            rows = [row for row in context.measured if row.subjects == (subject.id,)]
            trainer = subject.sae.provenance.get("trainer") or {}
            config, cautions = subject.sae.config, context.cautions.get(subject.id, ())
            evidence = gather(rows, latents=config.d_sae, d_in=config.d_in, moved=trainer.get("moved"), cautions=cautions)
            judgement = judge(evidence, self.config)
            found += [self._verdict(subject, judgement, evidence, context.seed), self._score(subject, judgement, evidence, context.seed)]
            names = list(dict.fromkeys(row.dataset for row in rows if row.dataset is not None))
            first = IN if IN in names else names[0] if names else None
            own = [row for row in rows if row.evaluator != HEALTH]  # native/health tells its own shifts
            found += deltas(own, first, lambda row, **change: replace(row, evaluator=EVALUATOR, version=self.version, seed=context.seed, **change))
        return found

    def _row(self, subject: Subject, metric: str, value: float | None, seed: int, **more: object) -> Measurement:
        better = "higher" if metric == "verdict_score" else "none"
        return Measurement(
            metric, value, (subject.id,), EVALUATOR, f"saehub.{metric}/1", (subject.hash,), subject.site, version=self.version, seed=seed, better=better,
            unit_of_n="measurements", **more,
        )  # fmt: skip

    def _verdict(self, subject: Subject, judgement: Judgement, evidence: Evidence, seed: int) -> Measurement:
        parts = {
            "word": judgement.verdict,
            "reasons": list(judgement.reasons),
            "flags": list(judgement.flags),
            "next": list(judgement.next),
            "rule": judgement.rule,
            "doomed": judgement.doomed,
            "evidence": evidence_table(evidence),
        }
        words = "; ".join(judgement.reasons) + (f" [{', '.join(judgement.flags)}]" if judgement.flags else "")
        return self._row(subject, "verdict", WORDS.index(judgement.verdict), seed, note=words, n=len(evidence.sources), parts=parts)

    def _score(self, subject: Subject, judgement: Judgement, evidence: Evidence, seed: int) -> Measurement:
        if judgement.score is None:
            return self._row(subject, "verdict_score", None, seed, status="not_measured", reason="it needs reconstruction, deadness and redundancy, all measured")
        note = "for the order within a sweep; errors of its factors taken as independent"
        return self._row(subject, "verdict_score", judgement.score, seed, n=len(evidence.sources), stderr=score_error(evidence, judgement.score), note=note)


def score_error(evidence: Evidence, score: float) -> float | None:
    """Standard error of (recovered)(1 - dead)(1 - excess) to first order, each factor's error over the factor; None where one is unknown."""
    factors = (("recovered", evidence.recovered), ("dead", 1 - evidence.dead), ("redundancy", 1 - max(0.0, evidence.excess)))
    factors = factors if evidence.recovered is not None else (("fvu", 1 - evidence.fvu), *factors[1:])
    total = 0.0
    for name, factor in factors:
        stderr = evidence.sources[name].stderr if name in evidence.sources else None
        if stderr is None or factor <= 0:
            return None
        total += (stderr / (1 - (evidence.redundancy_null or 0.0)) / factor if name == "redundancy" else stderr / factor) ** 2
    return score * math.sqrt(total)


def evidence_table(evidence: Evidence) -> list[dict]:
    """What the verdict rests on: metric, dataset, value, error, definition of each."""
    names = ("metric", "dataset", "value", "stderr", "definition")
    return [{name: getattr(row, name) for name in names} for row in evidence.sources.values()]
