"""SAEs and a model in; one evaluator's measurements out: refusals first, then every seed in a private folder, with failures in SAEBench's own words."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from saehub.api import EvalContext, Measurement, Subject
from saehub.errors import SaehubError
from saehub_saebench.admission import bridge_of, refusal
from saehub_saebench.isolation import private_folder, seed_everything, untouched_world
from saehub_saebench.lockstep import Remembered
from saehub_saebench.rows import Place, Scores, measurements
from saehub_saebench.sae import FOLDED, BenchSAE, bench_sae

Key = tuple[str | None, str | None]
"""(dataset, its hash) of some rows; (None, None) for those over all datasets."""
PATHS = ("data_dir", "labelled", "forget", "retain", "questions", "question_ids")
"""Settings that name files or folders."""


class BenchEvaluator:
    """What the evaluators share. A subclass gives `name`, `metrics` and `score`, and `prepare` where work does not depend on the SAE."""

    name = ""
    """The component's name."""
    needs_model = True
    remembers = False
    """Whether `score` reads activations alone, which are then the same for every SAE."""
    share = True
    """False: every forward pass is made again for each SAE, as SAEBench does, for comparison."""

    def __init__(self, config: Any):
        self.config = rooted(config)

    # What a subclass says

    def metrics(self) -> list[str]:
        """The metrics that an SAE that cannot be measured gets rows for."""
        raise NotImplementedError

    def check(self, context: EvalContext) -> None:
        """Raise for what would stop every SAE (a dataset that is not here), before work."""

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """Work that no SAE enters, once a seed: what it leaves in `shared` is read by every `score` of that seed."""

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """Run SAEBench on one SAE in the current (private, empty) folder."""
        raise NotImplementedError

    def note(self, sae: BenchSAE) -> str | None:
        """A caveat for every row of this SAE."""
        return FOLDED if sae.largest_norm_error > 1e-4 else None

    # What the hub calls

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """All measurements. SAEs, model, grad mode, random states and environment are as before when this returns."""
        reasons = {subject.id: refusal(subject, context, self.config) for subject in context.subjects}
        taken = [subject for subject in context.subjects if reasons[subject.id] is None]
        scores: dict[str, dict[int, dict[Key, Scores]]] = {subject.id: {} for subject in taken}
        notes: dict[str, str | None] = {}
        if taken:
            self.check(context)
            with untouched_world():
                self._run(context, taken, scores, reasons, notes)
        return [row for subject in context.subjects for row in self._rows(subject, context, scores, reasons, notes)]

    def _run(self, context: EvalContext, taken: list[Subject], scores: dict, reasons: dict, notes: dict) -> None:
        model = bridge_of(context) if self.needs_model else None
        saes = {subject.id: self.wrap(subject, context) for subject in taken}
        notes |= {name: self.note(sae) for name, sae in saes.items()}
        scratch = Path(context.work_dir).absolute() / f"saebench-{self.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        context = replace(context, work_dir=scratch)
        asked = Remembered(model, scratch / "activations") if self.remembers and self.share else model
        try:
            self._seeds(context, taken, saes, model, asked, scores, reasons)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # activations and datasets are large

    def _seeds(self, context: EvalContext, taken: list[Subject], saes: dict[str, BenchSAE], model: Any, asked: Any, scores: dict, reasons: dict) -> None:
        for done, seed in enumerate(self.config.seeds):
            shared = context.work_dir / f"shared-{seed}"
            shared.mkdir()
            try:
                with private_folder(context.work_dir, shared=True, seed=seed, config=asdict(self.config)):
                    seed_everything(seed)
                    self.prepare(context, model, list(saes.values()), seed, shared)
                for at, subject in enumerate(taken):
                    if reasons[subject.id] is None:
                        self._one(subject, saes[subject.id], asked, seed, shared, context, scores, reasons)
                    part = (done + (at + 1) / len(taken)) / len(self.config.seeds)
                    context.emit({"progress": part, "text": f"seed {seed}: {subject.id}"})
            finally:
                shutil.rmtree(shared, ignore_errors=True)

    def _one(self, subject: Subject, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext, scores: dict, reasons: dict) -> None:
        identity = {
            "eval": self.name,
            "tensors": subject.hash,
            "site": subject.site,
            "config": asdict(self.config),
            "model": context.model.fingerprint if context.model else None,
            "seed": seed,
        }
        try:
            with private_folder(context.work_dir, **identity):
                seed_everything(seed)
                scores[subject.id][seed] = self.score(sae, model, seed, shared, context)
        except SaehubError:
            raise
        except Exception as error:
            reasons[subject.id] = "failed: " + words(error)

    def wrap(self, subject: Subject, context: EvalContext) -> BenchSAE:
        """The SAE as SAEBench wants it, its config completed by SAEBench itself."""
        sae = bench_sae(subject, context.model if self.needs_model else None)
        if context.model is not None and self.needs_model:
            sae.to(dtype=context.model.hf.dtype)
            standardise(sae)
        return sae

    def _rows(self, subject: Subject, context: EvalContext, scores: dict, reasons: dict, notes: dict) -> Iterable[Measurement]:
        place = Place(self.name, subject, context, self.config.seeds, note=notes.get(subject.id))
        reason = reasons[subject.id]
        if reason is not None:
            failed = reason.startswith("failed: ")
            return place.missing(self.metrics(), reason.removeprefix("failed: "), "failed" if failed else "not_measured")
        found = scores[subject.id]
        keys = list(dict.fromkeys(key for by_key in found.values() for key in by_key))
        rows = []
        for dataset, digest in keys:
            here = Place(self.name, subject, context, self.config.seeds, dataset, digest, notes.get(subject.id))
            rows += measurements(here, {seed: by_key[dataset, digest] for seed, by_key in found.items()})
        return rows


def rooted(config: Any) -> Any:
    """`config` with absolute paths: SAEBench runs in folders of its own."""
    whole = lambda path: path and str(Path(path).expanduser().absolute())  # noqa: E731
    given = {name: getattr(config, name) for name in PATHS if getattr(config, name, None)}
    return replace(config, **{name: {key: whole(path) for key, path in value.items()} if isinstance(value, Mapping) else whole(value) for name, value in given.items()})


def standardise(sae: BenchSAE) -> None:
    """SAEBench's own completion of `sae.cfg`."""
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    load_and_format_sae("saehub", sae, str(sae.device))


def words(error: BaseException) -> str:
    """An exception of SAEBench, verbatim, with the place it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
