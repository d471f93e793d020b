"""A training run at some share of its rows in; the verdict so far, from held-out text, out: told at once, kept for the run card, and, if asked, the end.

The look changes nothing: the state of the session is saved, loaded into a second session, and that one is finished and evaluated with what
the recipe's judge reads (`early_reads` of its settings), on the first rows of every evaluation dataset.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from saehub.api import Measurement
from saehub.errors import Interrupted, SaehubError, StageFailed
from saehub.jsonio import read_json, write_json_atomic
from saehub.report.table import measurement
from saehub.report.verdicts import Verdict, verdicts

if TYPE_CHECKING:
    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Plan, Stage
    from saehub.pipeline.train import Trainee

FILE = "early.json"


class EarlyLook:
    """The looks of one job: due at some steps, taken once each, also over interruptions."""

    def __init__(self, trainee: Trainee, judge: Stage):
        self.trainee, self.context, self.judge = trainee, trainee.context, judge
        self.entry = self.context.plan.recipe.early
        self.work = self.context.plan.base / "work" / f"early-{trainee.stage.key[:20]}"
        file = trainee.folder / FILE
        self.taken: list[dict[str, Any]] = read_json(file)["looks"] if file.is_file() else []
        """What was said, oldest first: share, step, rows, and the fields of a Verdict."""
        done = {look["step"] for look in self.taken}
        steps = {max(1, math.ceil(share * trainee.job.steps)): share for share in self.entry.at}
        self.due = {step: share for step, share in sorted(steps.items()) if step not in done and trainee.step < step < trainee.job.steps}
        """Optimizer step -> share of the rows."""

    def next_step(self) -> int | None:
        """The step before which training must stop for a look."""
        return next(iter(self.due), None)

    def refuse(self) -> None:
        """Raise where an earlier look said that it is doomed, and doomed runs are to be stopped."""
        doomed = next((look for look in self.taken if look.get("doomed")), None)
        if doomed and self.entry.stop_doomed:
            raise self._stopped(doomed)

    def take(self) -> None:
        """Look, tell, remember. A look that itself breaks is a warning; only `stop_doomed` ends a run."""
        step = self.trainee.step
        share = self.due.pop(step)
        events, stage = self.context.events, self.trainee.stage
        try:
            rows = self._measure()
            (verdict,) = verdicts(rows)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001
            events("warning", stage.id, text=f"the look at {share:.0%} of the rows failed: {type(error).__name__}: {error}")
            return
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        doomed = any(row.metric == "verdict" and row.parts.get("doomed") for row in rows)
        look = {"share": share, "step": step, "rows": step * self.trainee.job.batch, "doomed": doomed, **verdict.to_json()}
        self.taken.append(look)
        self.trainee.folder.mkdir(parents=True, exist_ok=True)
        said = next(row for row in rows if row.metric == "verdict").to_json() if doomed else None
        write_json_atomic(self.trainee.folder / FILE, {"schema": 1, "looks": self.taken, "doomed": said})
        events("warning" if doomed else "log", stage.id, text=self._words(verdict, share), early=look)
        if doomed and self.entry.stop_doomed:
            self.trainee.save()
            raise self._stopped(look)

    @staticmethod
    def _words(verdict: Verdict, share: float) -> str:
        return f"after {share:.0%} of the rows, on held-out text: {verdict.word} ({'; '.join(verdict.reasons)})" + (
            f"; next: {verdict.next[0]}" if verdict.next and verdict.word not in ("good", "undecided") else ""
        )

    def _stopped(self, look: dict[str, Any]) -> StageFailed:
        return StageFailed(
            f"{self.trainee.job.id} was stopped after {look['share']:.0%} of its rows: {look['word']}",
            where=self.trainee.stage.id,
            why="; ".join(look["reasons"]),
            fix=f"{'; '.join(look['next'][:2])}. To go on regardless: --set early.stop_doomed=false (its state is kept)",
        )

    # ------------------------------------------------------------------ measuring
    def _measure(self) -> list[Measurement]:
        """The judge's rows about the SAE as it would be if training ended here."""
        from saehub.pipeline.evaluation import open_context
        from saehub.recipe.check import make_config

        context, plan = self.context, self.context.plan
        registered = plan.catalog.find("evaluator", self.judge.component)
        spec = self._spec()
        measured: list[Measurement] = []
        for address, settings in self.judge.spec["config"].early_reads.items():
            reader = plan.catalog.find("evaluator", address)
            local = not reader.component.requires
            opened = open_context(spec, model=context.model if local else None, extractor=context.extractor if local else None, emit=self._give_way)
            measured += context.components.make(reader, make_config(reader, dict(settings))).evaluate(opened)
        spec = {**spec, "measured": [row.to_json() for row in measured], "model": None, "datasets": {}}
        return list(context.components.make(registered, self.judge.spec["config"]).evaluate(open_context(spec)))

    def _give_way(self, event: dict) -> None:
        if self.context.stop.is_set():
            raise Interrupted("stopped; every job's state is saved", fix="the same command goes on from here")

    def _spec(self) -> dict[str, Any]:
        from saehub.checkpoint.format import save

        trainee, plan = self.trainee, self.context.plan
        twin = trainee.open()
        twin.load_state(*trainee.state())
        sae = twin.finish().to("cpu").scale_input(trainee.scale_in, trainee.scale_out)
        job, extract = trainee.job, plan.recipe.extract
        sae.provenance.update(site=job.site, target_site=job.target_site)
        path = save(sae, self.work / "checkpoint", overwrite=True)
        datasets = {stage.spec["name"]: str(stage.where / "tokens") for stage in plan.of("tokens") if stage.spec["name"] != "train"}
        return {
            "subjects": [{"id": job.id, "path": str(path), "site": job.site, "target_site": job.target_site}],
            "model": asdict(plan.model) if plan.model else None,
            "datasets": datasets,
            "extractor": {"address": plan.catalog.find("extractor", extract.uses).address, "config": dict(extract.with_)},
            "seed": self.judge.spec["seed"],
            "device": self.context.device,
            "work_dir": str(self.work / "scratch"),
            "lm_batch": extract.lm_batch,
            "rows": self.entry.tokens,
        }


def stopped_rows(plan: Plan) -> list[Measurement]:
    """The verdicts that ended trainings of this plan: what is known of an SAE that was stopped, for the tables."""
    found = []
    for stage in plan.of("train") if plan.recipe.early.stop_doomed else ():
        file = plan.store.state_path(stage.key) / FILE
        if not file.is_file() or plan.store.complete(stage.kind, stage.key):
            continue
        kept = read_json(file)
        if kept.get("doomed"):
            row = measurement(kept["doomed"])
            flag = f"stopped after {kept['looks'][-1]['share']:.0%} of its rows"
            parts = {**row.parts, "flags": [flag, *row.parts.get("flags", ())]}
            found.append(replace(row, parts=parts, note=f"{flag}: {row.note or ''}".rstrip(": ")))
    return found


def early_look(trainee: Trainee) -> EarlyLook | None:
    """The looks of a job; None where its recipe has no judge for it that can look early, no held-out text, or switches it off."""
    plan = trainee.context.plan
    if not plan.recipe.early.at or not any(stage.spec["name"] != "train" for stage in plan.of("tokens")):
        return None
    for stage in plan.of("evaluate"):
        judge = trainee.stage.id in stage.spec["subjects"] and "measurements" in plan.catalog.find("evaluator", stage.component).component.needs
        if judge and getattr(stage.spec["config"], "early_reads", None):
            try:
                for address in stage.spec["config"].early_reads:
                    plan.catalog.require(plan.catalog.find("evaluator", address))
            except SaehubError:
                return None
            return EarlyLook(trainee, stage)
    return None
