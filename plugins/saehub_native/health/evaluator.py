"""SAEs and datasets in; the soundness of each dictionary (geometry, deadness, scale, finiteness) beside its nulls out: `native/health`."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from saehub.api import EvalContext, EvalDataset, Measurement, Subject
from saehub.errors import StageFailed
from saehub_native.evaluate import deadness
from saehub_native.evaluate.core import FIRST, _own_failure
from saehub_native.evaluate.metrics import NORMAL_95, ratio
from saehub_native.evaluate.pieces import pieces
from saehub_native.evaluate.subjects import on_device
from saehub_native.evaluate.table import Table
from saehub_native.health import geometry
from saehub_native.health.activity import HealthRun
from saehub_native.health.config import HealthConfig
from saehub_native.health.definitions import of_metric
from saehub_native.health.deltas import deltas

EVALUATOR = "native/health"
LIBRARY_WINDOW = 10_000_000
"""Rows without firing after which several libraries call a latent dead by default."""
NOT_SPARSE = 0.1
"""L0 / F above which a code is flagged as not sparse."""
WEIGHTS = ("redundancy", "redundancy_null", "duplicate_share", "encoder_decoder_cosine")
ON_DATA = ("finite_share", "activation_norm", "norm_ratio", "l0_share", "dense_share", "cofiring", "dead_share", "dead_share_library", "waking_share")


class HealthEvaluator:
    """`native/health`. Definitions of all metrics: `saehub_native.health.definitions`."""

    def __init__(self, config: HealthConfig | None = None):
        self.config = config or HealthConfig()
        try:
            self.version = version("saehub")
        except PackageNotFoundError:
            self.version = ""

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """All measurements; an SAE that breaks has `failed` rows, and what cannot be measured is `not_measured` with the reason."""
        if context.rows is None:
            raise StageFailed("native/health was given no rows", why="EvalContext.rows is None", fix="give the extractor's rows(dataset, sites)")
        with torch.no_grad():
            saes = {subject.id: on_device(subject.sae, torch.device(context.device)) for subject in context.subjects}
            found: dict[str, list[Measurement]] = {}
            near: dict[str, geometry.Neighbours | None] = {}
            for subject in context.subjects:
                found[subject.id], near[subject.id] = self._weights(subject, saes[subject.id], context.seed)
            for name, dataset in context.datasets.items():
                for subject, rows in self._on(dataset, context, saes, near):
                    found[subject.id] += rows
        first = FIRST if FIRST in context.datasets else next(iter(context.datasets), None)
        for rows in found.values():
            rows += deltas(rows, first, lambda row, **change: replace(row, evaluator=EVALUATOR, version=self.version, **change))
        return [row for subject in context.subjects for row in found[subject.id]]

    # ------------------------------------------------------------------ weights
    def _weights(self, subject: Subject, sae: Any, seed: int) -> tuple[list[Measurement], geometry.Neighbours | None]:
        out = _Out(subject, None, seed, self.version)
        tensors = {name: tensor for name, tensor in sae.tensors().items() if tensor.is_floating_point()}
        total = sum(tensor.numel() for tensor in tensors.values())
        broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
        bad = sum(broken.values())
        latents, width = sae.config.d_sae, sae.config.d_out
        expansion = latents / sae.config.d_in
        flag = f"undercomplete: {latents:,} latents for a space of {sae.config.d_in:,} dimensions" if expansion < 1 else "from the shapes: exact"
        out.put("expansion", expansion, note=flag, parts={"latents": latents, "d_in": sae.config.d_in})
        out.put("finite_weights", 1 - bad / total, note="counted: exact", parts={name: n for name, n in broken.items() if n})
        if bad:
            reason = f"{bad:,} of {total:,} weights are NaN or infinite ({', '.join(name for name, n in broken.items() if n)})"
            for metric in WEIGHTS:
                out.failed(metric, reason)
            return out.rows, None
        near = geometry.neighbours(sae.W_dec, self.config.duplicate_cosine, self.config.memory)
        mean, spread = geometry.random_maximum(latents, width)
        # The ratio to the null says little where the null is 0; the difference never does.
        parts = {"null": mean, "above_null": near.redundancy - mean, "histogram": _histogram(near.cosine_F), "zero_rows": int((sae.W_dec == 0).all(dim=1).sum())}
        out.over_latents("redundancy", near.cosine_F if latents > 1 else np.zeros(1), parts=parts)
        out.share("redundancy_null", mean, math.sqrt(2 / latents) * spread, latents, f"F = {latents:,} random directions in {width:,} dimensions", {"spread": spread})
        sizes = near.cluster_sizes()
        listed = {"pairs": near.pairs, "clusters": len(sizes), "largest": sizes[:20], "closest": near.closest(self.config.pairs)}
        out.over_latents("duplicate_share", (near.cosine_F >= self.config.duplicate_cosine).astype(float), f"cosine ≥ {self.config.duplicate_cosine:g}", listed)
        if "W_enc" not in tensors:
            out.missing("encoder_decoder_cosine", f"a {sae.config.architecture} SAE has no encoder of its own: it is the decoder")
        elif sae.config.d_in == sae.config.d_out and (subject.target_site or subject.site) == subject.site:
            out.over_latents("encoder_decoder_cosine", geometry.column_cosine(sae.W_enc, sae.W_dec))
        else:
            out.missing("encoder_decoder_cosine", "a transcoder's encoder and decoder live in different spaces")
        return out.rows, near

    # ------------------------------------------------------------------ rows
    def _on(self, dataset: EvalDataset, context: EvalContext, saes: dict, near: dict):
        """(subject, its measurements on `dataset`), one pass for all."""
        runs = []
        for subject in context.subjects:
            close = near[subject.id]
            index_F = close.index_F if close else np.zeros(saes[subject.id].config.d_sae, dtype=np.int64)
            runs.append(HealthRun(subject, saes[subject.id], context.device, self.config.memory, index_F))
        sites = list(dict.fromkeys(site for run in runs for site in (run.site, run.target)))
        failures: dict[str, str] = {}
        total = dataset.tokens.n_sequences if dataset.tokens is not None else 0
        seen, unit = 0, "blocks of rows"
        for piece in pieces(context.rows(dataset, sites), dataset.tokens.context if dataset.tokens is not None else None, None):
            unit = "sequences" if piece.context else unit
            for run in runs:
                if run.subject.id not in failures:
                    with _own_failure(failures, run.subject.id):
                        run.look(piece)
            seen += piece.sequences
            if total:
                context.emit({"progress": min(seen / total, 1.0), "text": f"{dataset.name}: {seen:,} of {total:,} sequences"})
        for run in runs:
            out = _Out(run.subject, dataset, context.seed, self.version, unit)
            reason = failures.get(run.subject.id)
            if reason or not run.rows:
                for metric in ON_DATA:
                    out.failed(metric, reason) if reason else out.missing(metric, f"no row of {dataset.name} is kept")
            else:
                self._rows(out, run)
            yield run.subject, out.rows

    def _rows(self, out: _Out, run: HealthRun) -> None:
        sums, config = run.sums, self.config
        out.estimate("finite_share", ratio(sums["finite"], sums["rows"]))
        finite_S = sums["finite"]
        out.estimate("activation_norm", ratio(sums["norm"], finite_S), parts={"largest_number": run.largest if math.isfinite(run.largest) else None})
        out.estimate("norm_ratio", ratio(sums["ratio"], sums["counted"]))
        share = ratio(sums["l0"], sums["rows"] * run.latents)
        out.estimate("l0_share", share, f"not sparse: more than {NOT_SPARSE:.0%} of the latents are active on a row" if share.value > NOT_SPARSE else None)
        dense, dense_error = run.dense_share(config.dense_rate)
        out.share("dense_share", dense, dense_error, run.rows, f"more than {config.dense_rate:.0%} of the rows", {}, "rows")
        together, together_error = run.cofiring()
        if math.isfinite(together):
            out.share("cofiring", together, together_error, int((run.first_F >= 0).sum()), None, {}, "latents")
        else:
            out.missing("cofiring", "no latent fired")
        self._deadness(out, run)

    def _deadness(self, out: _Out, run: HealthRun) -> None:
        fired_F, sequences_F, last_F = run.firing_arrays()
        looked_at = np.flatnonzero(run.sums["rows"])
        watched = deadness.budget(fired_F, sequences_F, run.rows, len(looked_at))
        silent, stderr, _ = deadness.silent_share(sequences_F, last_F, looked_at)
        budget = {"rows": watched.rows, "effective_tokens": watched.tokens, "bound": watched.bound, "silent": int((sequences_F == 0).sum()), "latents": run.latents}
        if not budget["silent"]:
            out.share("dead_share", silent, stderr, len(looked_at), f"every latent fired, so none is dead at r0 = {self.config.dead_rate:g}", budget)
        elif watched.decides(self.config.dead_rate):
            out.share("dead_share", silent, stderr, len(looked_at), f"r0 = {self.config.dead_rate:g}", budget)
        else:
            out.missing("dead_share", watched.undecided(self.config.dead_rate), budget)
        window, whose = library_window(run.sae.provenance)
        if run.rows >= window:
            value = run.silent_in_last(window)
            out.share("dead_share_library", value, math.sqrt(value * (1 - value) / run.latents), run.latents, whose, {"window": window}, "latents")
        else:
            out.missing("dead_share_library", f"{whose}, and the dataset has {run.rows:,} rows", {"window": window})
        waking = run.waking_share()
        curve = run.curve(self.config.curve_points, watched.burst)
        out.share("waking_share", waking, math.sqrt(waking * (1 - waking) / run.latents), run.latents, f"3/N = {watched.bound:.2g} at the end", {"curve": curve, **budget}, "latents")


def library_window(provenance: dict[str, Any]) -> tuple[int, str]:
    """Rows without firing after which the library that trained the SAE calls a latent dead, and a sentence about it.

    Read from the trainer's recorded settings: `dead_after` and `dead_feature_threshold` count rows, `dead_feature_window` counts steps.
    """
    trainer = provenance.get("trainer") or {}
    settings = trainer.get("config") or {}
    for name, unit in (("dead_after", 1), ("dead_feature_threshold", 1), ("dead_feature_window", settings.get("batch") or settings.get("train_batch_size_tokens"))):
        value = settings.get(name)
        if isinstance(value, (int, float)) and value >= 1 and unit:
            return int(value * unit), f"{trainer.get('component', 'its trainer')} has {name} = {value:g}: dead after {int(value * unit):,} rows without firing"
    return LIBRARY_WINDOW, f"no window is recorded: {LIBRARY_WINDOW:,} rows without firing, a common default"


def _histogram(values_F: np.ndarray) -> dict[str, list]:
    counts, edges = np.histogram(values_F, bins=40, range=(-1, 1))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


class _Out(Table):
    """The rows of `native/health`; weights need no dataset."""

    def __init__(self, subject: Subject, dataset: EvalDataset | None, seed: int, version: str, unit: str = "latents"):
        super().__init__(subject, dataset or EvalDataset(None, None, None), seed, version, unit, evaluator=EVALUATOR, find=of_metric)

    def put(self, metric: str, value: float, **more: Any) -> None:
        """A number without an error; `note` says why."""
        self._add(metric, value, **more)

    def over_latents(self, metric: str, values_F: np.ndarray, note: str | None = None, parts: dict | None = None) -> None:
        """A mean over latents with the standard error of it."""
        n, value = len(values_F), float(values_F.mean())
        error = float(values_F.std(ddof=1)) / math.sqrt(n) if n > 1 else None
        wide = NORMAL_95 * error if error is not None else None
        note = note or (None if error is not None else "one latent: no error")
        low, high = (None, None) if wide is None else (value - wide, value + wide)
        self._add(metric, value, stderr=error, ci_low=low, ci_high=high, n=n, note=note, parts=parts or {})
