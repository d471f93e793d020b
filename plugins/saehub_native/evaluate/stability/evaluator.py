"""Several SAEs of one site in; what each pair of them shares, by firing rate and beside its nulls, out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import torch

from saehub.api import EvalContext, EvalDataset, Measurement, Subject
from saehub.errors import Interrupted, SaehubError, StageFailed
from saehub_native.evaluate.matching.assignment import Assignment, assign
from saehub_native.evaluate.pieces import pieces
from saehub_native.evaluate.stability.config import StabilityConfig
from saehub_native.evaluate.stability.definitions import BY_METRIC
from saehub_native.evaluate.stability.pairs import CURVE, Dictionary, Pair, mean_and_error, subspace_overlaps
from saehub_native.evaluate.stability.untrained import before_training
from saehub_native.evaluate.subjects import SubjectRun, on_device

EVALUATOR, FIRST = "native/stability", "in_sample"
CALIBRATION_ROWS = 16_384
SAID_AT = (0.2, 0.5, 0.9)
"""Thresholds with a row of their own beside the configured one (published replications differ most in this)."""
PAIR_METRICS = ("shared_share", "pw_mcc", "pw_mcc_abs", "encoder_mcc", "index_agreement")
NULL_METRICS = ("shared_share", "pw_mcc", "pw_mcc_abs")


class StabilityEvaluator:
    """`native/stability`. Definitions of all metrics: `saehub_native.evaluate.stability.definitions`."""

    def __init__(self, config: StabilityConfig | None = None):
        self.config = config or StabilityConfig()

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """All pairs of SAEs that read (and write) the same site; an SAE without another at its site has one row that says so."""
        if context.rows is None:
            raise StageFailed(f"{EVALUATOR} was given no rows", why="EvalContext.rows is None", fix="give the extractor's rows(dataset, sites)")
        with torch.no_grad():
            return list(_Comparison(self.config, context).run())


def row(metric: str, value: float | None, subjects: Sequence[Subject], **more) -> Measurement:
    """A measurement of `subjects` on no dataset, unless `more` names one."""
    known = BY_METRIC[metric.partition("@")[0]]
    ids, hashes = tuple(s.id for s in subjects), tuple(s.hash for s in subjects)
    low, high = more.get("stderr"), more.get("stderr")
    if value is not None and low is not None:
        more |= {"ci_low": value - 1.959964 * low, "ci_high": value + 1.959964 * high}
    return Measurement(
        metric, value, ids, EVALUATOR, known.id, hashes, subjects[0].site, better=known.better, **{"unit_of_n": "latents", **more}
    )  # fmt: skip


def missing(metric: str, reason: str, subjects: Sequence[Subject], **more) -> Measurement:
    """No number, and why."""
    return row(metric, None, subjects, status="not_measured", reason=reason, **more)


class _Comparison:
    def __init__(self, config: StabilityConfig, context: EvalContext):
        self.config, self.context = config, context
        names = list(context.datasets)
        self.first: EvalDataset | None = context.datasets[FIRST if FIRST in names else names[0]] if names else None
        self.rates: dict[str, np.ndarray | str] = {}
        """SAE id -> firing rate of each latent on the first dataset, or why there is none."""
        self.begun_with: dict[str, Dictionary | str] = {}
        self.random: dict[tuple[int, int, int], Pair] = {}
        self.steps, self.step = 1, 0

    def run(self) -> Iterator[Measurement]:
        groups: dict[tuple, list[Subject]] = {}
        for subject in self.context.subjects:
            sae = subject.sae.config
            groups.setdefault((subject.site, subject.target_site, sae.d_in, sae.d_out), []).append(subject)
        self.steps = 2 + sum(len(group) * (len(group) - 1) // 2 for group in groups.values())
        self._look(groups)
        for (site, target, *_), group in groups.items():
            if len(group) == 1:
                where = f"{site} → {target}" if target else site
                yield missing("shared_share", f"no other SAE of the same widths at {where} to compare it with", group)
            found = {}
            for a, b in combinations(group, 2):
                self.step += 1
                try:
                    found[a.id, b.id] = pair = Pair(*self._dictionaries(a, b), self._match(f"{a.id} and {b.id}"))
                    yield from self._pair(a, b, pair)
                except SaehubError as error:
                    if isinstance(error, Interrupted):
                        raise
                    found.pop((a.id, b.id), None)
                    for metric in PAIR_METRICS:
                        yield row(metric, None, (a, b), status="failed", reason=str(error).splitlines()[0])
            if len(group) > 2:
                yield from self._all(group, found)

    def _tell(self, text: str, share: float = 0.0) -> None:
        self.context.emit({"progress": min((self.step + share) / self.steps, 1.0), "text": text})

    def _match(self, what: str):
        settings = self.config
        return partial(
            assign, candidates=settings.candidates, seconds=settings.seconds, gap=settings.gap, memory=settings.memory, tell=lambda text: self._tell(f"{what}: {text}")
        )  # fmt: skip

    def _dictionaries(self, *subjects: Subject) -> list[Dictionary]:
        device = torch.device(self.context.device)
        return [Dictionary.of(on_device(subject.sae, device)) for subject in subjects]

    # ------------------------------------------------------------------ rows of the first dataset
    def _look(self, groups: dict[tuple, list[Subject]]) -> None:
        """Firing rates of every SAE, and what it began with, from one pass over the first dataset."""
        subjects = [subject for group in groups.values() if len(group) > 1 for subject in group]
        if self.first is None or not subjects:
            return
        device = torch.device(self.context.device)
        runs = [SubjectRun(subject, on_device(subject.sae, device), self.context.device, self.config.memory) for subject in subjects]
        sites = list(dict.fromkeys(site for run in runs for site in (run.site, run.target)))
        kept: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
        tokens, broken = self.first.tokens, {}
        for piece in pieces(self.context.rows(self.first, sites), tokens.context if tokens is not None else None, None):
            for site in sites:
                if sum(map(len, kept[site])) < CALIBRATION_ROWS:
                    kept[site].append(piece.kept(site).float().cpu())
            for run in runs:
                if run.subject.id not in broken:
                    try:
                        run.count(piece)
                    except Interrupted:
                        raise
                    except Exception as error:  # its own rows say so; the others go on
                        broken[run.subject.id] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            self._tell(f"firing rates on {self.first.name}")
        rows = {site: torch.cat(found)[:CALIBRATION_ROWS] for site, found in kept.items() if found}
        for run in runs:
            name = run.subject.id
            self.rates[name] = broken.get(name) or run.firing_arrays()[0] / max(run.firing.rows, 1)
            if self.config.nulls:
                self.begun_with[name] = broken.get(name) or self._begin(run.subject, rows)

    def _begin(self, subject: Subject, rows: dict[str, torch.Tensor]) -> Dictionary | str:
        if subject.site not in rows:
            return f"no row of {self.first.name} is kept"
        try:
            sae = before_training(subject, rows[subject.site], rows[subject.target_site] if subject.target_site else None)
        except SaehubError as error:
            if isinstance(error, Interrupted):
                raise
            return "; ".join(text for text in (error.what, error.why) if text)
        return Dictionary.of(sae)

    # ------------------------------------------------------------------ one pair
    def _pair(self, a: Subject, b: Subject, pair: Pair) -> Iterator[Measurement]:
        who, n, settings = (a, b), pair.pairs, self.config
        curve = {"x": list(CURVE), "y": pair.curve(), "x_label": "cosine that both must exceed", "title": "latents shared"}
        yield self._share("shared_share", pair.shared_F(settings.threshold), pair, who, f"threshold {settings.threshold:g}; {self._said(pair.decoder, pair.encoder)}", {"curve": curve})
        for threshold in SAID_AT:
            if threshold != settings.threshold:
                yield self._share(f"shared_share@{threshold:g}", pair.shared_F(threshold), pair, who, f"threshold {threshold:g}")
        for metric, found in (("pw_mcc", pair.decoder), ("pw_mcc_abs", pair.decoder_absolute), ("encoder_mcc", pair.encoder)):
            yield self._mean(metric, found.similarity_N[found.partner_N >= 0], who, self._said(found))
        yield self._share("index_agreement", pair.agreed_F, pair, who)
        for metric, chosen_F in (("cosine_where_agreed", pair.agreed_F), ("cosine_where_not", pair.matched_F & ~pair.agreed_F)):
            yield self._mean(metric, pair.decoder.similarity_N[chosen_F], who)
        yield row("assignment_gap", pair.gap, who, n=n, note="three matchings: decoder, |decoder|, encoder")
        yield from self._nulls(a, b, pair)
        yield from self._by_rate(a, b, pair)
        width = pair.a.decoder_FD.shape[1]
        ranks = sorted({max(1, width // part) for part in (16, 8, 4, 2)})
        for r, overlap in zip(ranks, subspace_overlaps(pair.a.decoder_FD, pair.b.decoder_FD, ranks), strict=True):
            yield row(f"subspace_overlap@{r}", overlap, who, n=n, note=f"{r} of {width} dimensions; exact, over the whole dictionaries")
            yield row(f"subspace_overlap_random@{r}", r / width, who, n=n, note="closed form")

    @staticmethod
    def _said(*found: Assignment) -> str:
        worst = max(found, key=lambda one: one.gap)
        return f"{worst.said}, {sum(one.seconds for one in found):.1f} s"

    def _share(self, metric: str, chosen_F: np.ndarray, pair: Pair, who: Sequence[Subject], note: str | None = None, parts: dict | None = None, **more) -> Measurement:
        n = pair.pairs
        share = float(chosen_F.sum() / n)
        return row(metric, share, who, stderr=float(np.sqrt(share * (1 - share) / n)), n=n, note=note, parts=parts or {}, **more)

    def _mean(self, metric: str, values: np.ndarray, who: Sequence[Subject], note: str | None = None, **more) -> Measurement:
        if len(values) == 0:
            return missing(metric, "there is no such latent", who, **more)
        value, stderr = mean_and_error(values)
        return row(metric, value, who, stderr=stderr, n=len(values), note=note or (None if stderr is not None else "one latent"), **more)

    def _nulls(self, a: Subject, b: Subject, pair: Pair) -> Iterator[Measurement]:
        who, settings = (a, b), self.config
        sizes = (a.sae.config.d_sae, b.sae.config.d_sae, a.sae.config.d_out)
        nulls: dict[str, Pair | str] = {"random": "switched off (nulls: false)", "init": "switched off (nulls: false)"}
        if settings.nulls:
            if sizes not in self.random:
                one, two = (Dictionary.random(F, sizes[2], self.context.seed, i) for i, F in enumerate(sizes[:2]))
                self.random[sizes] = Pair(one, two, self._match("random dictionaries"))
            nulls["random"] = self.random[sizes]
            begun = [self.begun_with.get(s.id, "no dataset was given") for s in who]
            reasons = [text for text in begun if isinstance(text, str)]
            nulls["init"] = reasons[0] if reasons else Pair(*begun, self._match("untrained SAEs"))
        for name, null in nulls.items():
            for metric in NULL_METRICS:
                if isinstance(null, str):
                    yield missing(f"{metric}_{name}", null, who)
                elif metric == "shared_share":
                    yield self._share(f"{metric}_{name}", null.shared_F(settings.threshold), null, who, f"threshold {settings.threshold:g}")
                else:
                    found = null.decoder if metric == "pw_mcc" else null.decoder_absolute
                    yield self._mean(f"{metric}_{name}", found.similarity_N[found.partner_N >= 0], who, self._said(found))

    def _by_rate(self, a: Subject, b: Subject, pair: Pair) -> Iterator[Measurement]:
        """The matching by firing rate of the first SAE's latents."""
        who, rates_F = (a, b), self.rates.get(a.id, "no dataset was given")
        where = {"dataset": self.first.name, "dataset_hash": self.first.hash} if self.first else {}
        if isinstance(rates_F, str):
            for metric in ("pw_mcc_by_rate", "shared_share_by_rate"):
                yield missing(metric, rates_F, who, **where)
            return
        shared_F = pair.shared_F(self.config.threshold)
        order = np.argsort(rates_F, kind="stable")
        fired = order[(rates_F[order] > 0) & pair.matched_F[order]]
        groups = {f"{i + 1}of{self.config.bins}": group for i, group in enumerate(np.array_split(fired, self.config.bins)) if len(group)}
        silent = np.flatnonzero((rates_F == 0) & pair.matched_F)
        for name, group in {**groups, **({"silent": silent} if len(silent) else {})}.items():
            note = "never fired" if name == "silent" else f"firing rates {rates_F[group[0]]:.2g} to {rates_F[group[-1]]:.2g}"
            yield self._mean(f"pw_mcc_by_rate@{name}", pair.decoder.similarity_N[group], who, note, **where)
            yield self._mean(f"shared_share_by_rate@{name}", shared_F[group].astype(float), who, note, **where)

    # ------------------------------------------------------------------ three or more
    def _all(self, group: list[Subject], found: dict[tuple[str, str], Pair]) -> Iterator[Measurement]:
        threshold = self.config.threshold
        if len(found) > 1:
            for metric, values in (
                ("pw_mcc_over_pairs", [float(np.nanmean(pair.decoder.similarity_N)) for pair in found.values()]),
                ("shared_share_over_pairs", [pair.shared_F(threshold).sum() / pair.pairs for pair in found.values()]),
            ):
                value, stderr = mean_and_error(np.array(values))
                yield replace(row(metric, value, group, stderr=stderr, n=len(values)), unit_of_n="pairs")
        for subject in group:
            others = [other for other in group if other is not subject]
            has_F = np.zeros(subject.sae.config.d_sae, bool)
            for (one, two), pair in found.items():
                shared_F = pair.shared_F(threshold)
                if one == subject.id:
                    has_F |= shared_F
                elif two == subject.id:
                    has_F[pair.decoder.partner_N[shared_F]] = True
            share = float(1 - has_F.mean())
            yield row("found_nowhere_share", share, [subject, *others], stderr=float(np.sqrt(share * (1 - share) / len(has_F))), n=len(has_F), note=f"threshold {threshold:g}")
