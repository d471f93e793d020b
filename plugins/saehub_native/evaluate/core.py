"""SAEs, a language model and datasets in; FVU, L0, loss recovered, deadness and baselines of each SAE on each dataset out.

Two passes over each dataset for all SAEs and sites together. The first finds the mean of every site (and, on the first dataset, the
second moments for PCA); the second reconstructs, splices and counts. The clean model runs once a batch, ablations once a site, baselines
once a site and k; every SAE adds one forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor

from saehub.api import EvalContext, EvalDataset, Measurement, Subject
from saehub.errors import Interrupted, StageFailed
from saehub.sites import Site, Tap
from saehub_native.evaluate import loss_recovered, table
from saehub_native.evaluate.accumulate import RowMoments, SequenceSums
from saehub_native.evaluate.baselines import PCA, RandomDictionary
from saehub_native.evaluate.config import CoreConfig
from saehub_native.evaluate.loss_recovered import LossPiece
from saehub_native.evaluate.metrics import row_quantities
from saehub_native.evaluate.pieces import BLOCK, Piece, pieces
from saehub_native.evaluate.subjects import SubjectRun, on_device

FIRST = "in_sample"
"""The dataset that baselines are fitted on, where there is one of this name; else the first."""


class CoreEvaluator:
    """`native/core`. Definitions of all metrics: `saehub_native.evaluate.definitions`."""

    def __init__(self, config: CoreConfig | None = None):
        self.config = config or CoreConfig()

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """All measurements; an SAE that breaks has `failed` rows, and what cannot be measured is `not_measured` with the reason.

        The model, the SAEs, the grad mode and torch's random state are as before when this returns.
        """
        if context.rows is None:
            raise StageFailed("native/core was given no rows", why="EvalContext.rows is None", fix="give the extractor's rows(dataset, sites)")
        with torch.no_grad():
            return _Evaluation(self.config, context).run()


@dataclass
class SiteMoments:
    """The first pass over one dataset at one site."""

    halves: tuple[RowMoments, RowMoments]
    """Even and odd sequences; with second moments where PCA will be fitted."""
    broken: int = 0
    """Rows with NaN or infinite numbers."""

    @property
    def rows(self) -> int:
        return self.halves[0].rows + self.halves[1].rows

    @property
    def mean_D(self) -> Tensor:
        """float64 [d]: the mean of all kept rows."""
        return (self.halves[0] + self.halves[1]).mean_D

    def trouble(self, site: str) -> str | None:
        """Why nothing at this site can be measured."""
        return f"{self.broken:,} activation rows at {site} hold NaN or infinite numbers" if self.broken else None


@dataclass
class BaselineRun:
    """One baseline on one dataset."""

    name: str
    """`pca`, `random` or `identity`."""
    site: str
    k: int
    latents: int = 0
    sums: SequenceSums = field(default_factory=SequenceSums)


class _Evaluation:
    def __init__(self, config: CoreConfig, context: EvalContext):
        self.config, self.context = config, context
        self.subjects = context.subjects
        self.sites = list(dict.fromkeys(site for s in self.subjects for site in (s.site, s.target_site or s.site)))
        self.targets = list(dict.fromkeys(s.target_site or s.site for s in self.subjects))
        names = list(context.datasets)
        self.first = FIRST if FIRST in names else names[0] if names else ""
        self.order = [self.first, *(name for name in names if name != self.first)] if names else []
        self.saes = {subject.id: on_device(subject.sae, torch.device(context.device)) for subject in self.subjects}
        self.failures: dict[str, str] = {}
        """SAE id -> why it failed before the second pass."""
        self.mean_l0: dict[str, float] = {}
        """SAE id -> mean L0 on the first dataset, of those whose architecture has no k."""
        self.baselines: dict[str, list[tuple[str, str, int, int]] | str] = {}
        """SAE id -> (name, site, k, latents) of its baselines, or why it has none."""
        self.pca: dict[str, PCA] = {}
        self.random: dict[tuple[str, int, int], RandomDictionary] = {}
        passes = 1 + 2 * len(self.targets) + (1 + len(config.beside)) * len(self.subjects)
        self.weight = 1.0 + (passes if config.loss and context.model is not None else 0)
        """What the second pass costs beside the first, in forward passes of the model: for the progress bar."""
        self.done, self.total = 0.0, (1 + self.weight) * max(len(names), 1)
        try:
            self.version = version("saehub")
        except PackageNotFoundError:
            self.version = ""

    def _new_run(self, subject: Subject) -> SubjectRun:
        return SubjectRun(subject, self.saes[subject.id], self.context.device, self.config.memory)

    def run(self) -> list[Measurement]:
        if not self.subjects:
            return []
        found: dict[tuple[str, str], list[Measurement]] = {}
        for name in self.order:
            dataset = self.context.datasets[name]
            moments = self._moments(dataset)
            if name == self.first:
                self._fit(dataset, moments)
            for subject, rows in self._measure(dataset, moments):
                found[subject.id, name] = rows
        return [row for subject in self.subjects for name in self.context.datasets for row in found[subject.id, name]]

    # ------------------------------------------------------------------ reading
    def _pieces(self, dataset: EvalDataset, at_once: int | None, doing: str, weight: float = 1.0) -> Iterator[Piece]:
        """The pieces of one pass over a dataset, with progress."""
        tokens = dataset.tokens
        context = tokens.context if tokens is not None else None
        total = tokens.n_sequences if tokens is not None else None
        seen, before = 0, self.done
        for piece in pieces(self.context.rows(dataset, self.sites), context, at_once):
            yield piece
            seen += piece.sequences
            if total:
                self.done = before + weight * min(seen / total, 1.0)
                self.context.emit({"progress": self.done / self.total, "text": f"{dataset.name}: {doing}, {seen:,} of {total:,} sequences"})
        self.done = before + weight

    # ------------------------------------------------------------------ first pass
    def _moments(self, dataset: EvalDataset) -> dict[str, SiteMoments]:
        """Mean of every site; on the first dataset, second moments for PCA and the mean L0 of SAEs that have no k."""
        found: dict[str, SiteMoments] = {}
        fit = bool(self.config.beside) and dataset.name == self.first
        counting = [run for run in map(self._new_run, self.subjects) if fit and not self.config.pca_k and run.paired and run.declared_k is None]
        for piece in self._pieces(dataset, None, "finding means"):
            odd_M = piece.units_M % 2 == 1
            for site in self.sites:
                x_MD = piece.kept(site)
                if site not in found:
                    width = x_MD.shape[1]
                    outer = "pca" in self.config.beside and fit and 8 * width**2 <= self.config.memory
                    found[site] = SiteMoments((RowMoments(width, x_MD.device, outer=outer), RowMoments(width, x_MD.device, outer=outer)))
                moments = found[site]
                moments.broken += int((~x_MD.isfinite().all(1)).sum())
                for half, chosen_M in enumerate((~odd_M, odd_M)):
                    moments.halves[half].add(x_MD[torch.from_numpy(chosen_M).to(x_MD.device)])
            for run in counting:
                if run.subject.id not in self.failures:
                    with _own_failure(self.failures, run.subject.id):
                        run.count(piece)
        self.mean_l0 |= {run.subject.id: run.mean_l0 for run in counting}
        return found

    def _fit(self, dataset: EvalDataset, moments: dict[str, SiteMoments]) -> None:
        """Which baselines every SAE gets, fitted on the first dataset."""
        for subject in self.subjects:
            where, run = moments.get(subject.site), self._new_run(subject)
            if not self.config.beside:
                self.baselines[subject.id] = "switched off (baselines: false)"
            elif not run.paired:
                self.baselines[subject.id] = "a transcoder's target is not its input: rebuilding the input is no baseline for it"
            elif where is None or where.rows == 0 or where.broken:
                self.baselines[subject.id] = f"{dataset.name} has no usable rows at {subject.site}"
            elif subject.id in self.failures:
                self.baselines[subject.id] = f"k is unknown: the SAE failed ({self.failures[subject.id]})"
            else:
                self._choose(subject, run, where)

    def _choose(self, subject: Subject, run: SubjectRun, where: SiteMoments) -> None:
        config, site = self.config, subject.site
        width = len(where.mean_D)
        k = max(1, config.pca_k or run.declared_k or round(self.mean_l0[subject.id]))
        chosen = {"pca": ("pca", site, min(k, width), 0), "random": ("random", site, min(k, run.latents), run.latents), "identity": ("identity", site, 0, 0)}
        self.baselines[subject.id] = [chosen[name] for name in config.beside]
        if "pca" in config.beside and site not in self.pca and where.halves[0].outer_DD is not None and min(half.rows for half in where.halves):
            self.pca[site] = PCA(where.halves)
        key = (site, min(k, run.latents), run.latents)
        if "random" in config.beside and key not in self.random and 4 * run.latents * width <= config.memory:
            self.random[key] = RandomDictionary.make(where.mean_D, run.latents, key[1], self.context.seed)

    def _no_baseline(self, name: str, site: str, k: int, latents: int) -> str | None:
        """Why this baseline cannot be made; None when it can."""
        if name == "pca" and site not in self.pca:
            return "PCA needs rows from two sequences of the first dataset, and d × d second moments within `memory`"
        if name == "random" and (site, k, latents) not in self.random:
            return "the random directions do not fit `memory`"
        return None

    # ------------------------------------------------------------------ second pass
    def _measure(self, dataset: EvalDataset, moments: dict[str, SiteMoments]) -> Iterator[tuple[Subject, list[Measurement]]]:
        config, model = self.config, self.context.model
        runs = [self._new_run(subject) for subject in self.subjects]
        for run in runs:
            troubles = (moments[site].trouble(site) for site in (run.site, run.target) if site in moments)
            run.failure = next((text for text in troubles if text), self.failures.get(run.subject.id))
        wanted = {key for keys in self.baselines.values() if isinstance(keys, list) for key in keys if self._no_baseline(*key) is None}
        beside = {key: BaselineRun(*key) for key in sorted(wanted) if moments.get(key[1]) and not moments[key[1]].broken}
        reason = None if config.loss else "switched off (loss: false)"
        reason = reason or loss_recovered.not_measurable(model, dataset.tokens is not None)
        site_sums = {site: SequenceSums() for site in self.targets}
        taps = {site: Site.parse(site).tap(model.shape) for site in self.targets} if reason is None else {}
        at_once = None
        if reason is None:
            at_once = loss_recovered.sequences_at_once(config.memory, dataset.tokens.context, model.shape.vocab, model.hf.dtype.itemsize)
        unit = f"blocks of {BLOCK} rows"
        for piece in self._pieces(dataset, at_once, "reconstructing", self.weight):
            unit = "sequences" if piece.context else unit
            losses = self._losses(piece) if reason is None and piece.context and piece.tokens_N is not None else None
            if losses is not None:
                self._ablate(losses, taps, moments, site_sums)
            for run in runs:
                if run.failure is None:
                    self._add_subject(run, piece, moments[run.target].mean_D, losses, taps)
            for key, base in beside.items():
                self._add_baseline(base, key, piece, moments[base.site].mean_D, losses, taps, dataset.name == self.first)
        everything = [*site_sums.values(), *(run.sums for run in runs), *(base.sums for base in beside.values())]
        size = max(sums.size for sums in everything)
        for sums in everything:
            sums.size = size
        if reason is None and not any("positions" in sums for sums in site_sums.values()):
            reason = "no position of this dataset is counted: the rows carry no token ids or sequences, or all are excluded"
        for run in runs:
            run.end()
            here = moments.get(run.target)
            yield run.subject, self._rows(run, dataset, here, site_sums[run.target], beside, reason, unit)

    def _losses(self, piece: Piece) -> LossPiece | None:
        """The clean losses of the piece's sequences, as far as `loss_sequences` reaches."""
        T = piece.context
        units_B = piece.units_N.reshape(-1, T)[:, 0]
        keep_BT = piece.keep_N.view(-1, T)
        limit = self.config.loss_sequences
        if limit is not None and (units_B >= limit).all():
            return None
        return LossPiece(self.context.model, piece.tokens_N.view(-1, T), keep_BT, units_B, limit)

    def _ablate(self, losses: LossPiece, taps: dict[str, Tap], moments: dict[str, SiteMoments], site_sums: dict[str, SequenceSums]) -> None:
        """Clean, zero- and mean-ablated losses of every target site."""
        units_M = losses.units_M
        for site, sums in site_sums.items():
            mean_D = moments[site].mean_D
            ce_zero, kl_zero = losses.under(taps[site], torch.zeros_like(mean_D))
            ce_mean, kl_mean = losses.under(taps[site], mean_D)
            sums.add(
                units_M, positions=np.ones(len(units_M)), ce_clean=losses.clean_ce_M,
                ce_zero=ce_zero, kl_zero=kl_zero, ce_mean=ce_mean, kl_mean=kl_mean,
            )  # fmt: skip

    def _add_subject(self, run: SubjectRun, piece: Piece, mean_D: Tensor, losses: LossPiece | None, taps: dict[str, Tap]) -> None:
        failures: dict[str, str] = {}
        with _own_failure(failures, run.subject.id):
            yhat_MD = run.add(piece, mean_D)
            if losses is not None:
                ce_M, kl_M = losses.under(taps[run.target], yhat_MD)
                run.sums.add(losses.units_M, ce_spliced=ce_M, kl_spliced=kl_M)
        run.failure = failures.get(run.subject.id)

    def _add_baseline(
        self, base: BaselineRun, key: tuple[str, str, int, int], piece: Piece, mean_D: Tensor, losses: LossPiece | None, taps: dict[str, Tap], own: bool
    ) -> None:
        x_MD = piece.kept(base.site)
        if base.name == "identity":
            xhat_MD = x_MD
        elif base.name == "pca":
            xhat_MD = self.pca[base.site].reconstruct(x_MD, piece.units_M, base.k, own=own)
        else:
            xhat_MD = self.random[key[1:]].reconstruct(x_MD, self.config.memory)
        quantities, _ = row_quantities(x_MD, xhat_MD, mean_D)
        base.sums.add(piece.units_M, squared_error=quantities["squared_error"], squared_total=quantities["squared_total"])
        if losses is not None:
            ce_M, _ = losses.under(taps[base.site], xhat_MD)
            base.sums.add(losses.units_M, ce=ce_M)

    # ------------------------------------------------------------------ measurements
    def _rows(self, run: SubjectRun, dataset: EvalDataset, here: SiteMoments | None, site: SequenceSums, beside: dict, reason: str | None, unit: str):
        out = table.Table(run.subject, dataset, self.context.seed, self.version, unit)
        empty = f"no row of {dataset.name} is kept" if here is None or here.rows == 0 else None
        limit = self.config.loss_sequences
        total = dataset.tokens.n_sequences if dataset.tokens is not None else 0
        note = f"first {limit:,} of {total:,} sequences" if limit and limit < total else None
        if empty or run.failure:
            for metric in (*table.RECONSTRUCTION, *table.firing_metrics(self.config)):
                out.missing(metric, empty) if empty else out.failed(metric, run.failure)
        else:
            table.reconstruction(out, run)
        lost = empty or reason
        broken = here.trouble(run.target) if here is not None else None
        for metric in table.SHARED_LOSSES if lost or broken else ():
            out.missing(metric, lost) if lost else out.failed(metric, broken)
        if not lost and not broken:
            table.shared_losses(out, site, note)
        for metric in table.OWN_LOSSES if lost or run.failure else ():
            out.missing(metric, lost) if lost else out.failed(metric, run.failure)
        if not lost and not run.failure:
            table.own_losses(out, site, run, note)
        if not empty and not run.failure:
            table.firing(out, run, self.config)
        self._baseline_rows(out, run, site, beside, empty, reason, note)
        return table.ordered(out.rows)

    def _baseline_rows(self, out: table.Table, run: SubjectRun, site: SequenceSums, beside: dict, empty: str | None, reason: str | None, note: str | None):
        chosen = self.baselines.get(run.subject.id, "no dataset was given")
        why = chosen if isinstance(chosen, str) else None
        keys = [(name, "", 0, 0) for name in self.config.beside or ("pca", "random")] if why else chosen
        for key in keys:
            missing = why or empty or self._no_baseline(*key)
            missing = missing or (None if key in beside else f"activation rows at {key[1]} hold NaN or infinite numbers")
            if missing:
                for metric in ("fvu", "ce_recovered_zero", "ce_recovered_mean"):
                    out.missing(f"{metric}_{key[0]}", missing)
            else:
                table.baseline(out, key[0], beside[key].sums, site, key[2], reason, note)


@contextmanager
def _own_failure(failures: dict[str, str], name: str) -> Iterator[None]:
    """Whatever one SAE does wrong becomes the reason of its own `failed` rows, and the others go on."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        failures[name] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
