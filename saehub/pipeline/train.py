"""Training stages of one stream in; finished checkpoints out, from one pass over the blocks that all jobs share and that can stop and go on anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from saehub.api import CalibrationRows
from saehub.errors import Interrupted, SaehubError, StageFailed
from saehub.pipeline.components import optional
from saehub.pipeline.early import early_look
from saehub.pipeline.movement import UNMOVED
from saehub.pipeline.progress import Progress
from saehub.pipeline.resume import drop_states
from saehub.seeds import derive

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Stage
    from saehub.pipeline.stream import HubStream

REMOTE_STEPS = 32
PROBE_ROWS = 256


class Trainee(Progress):
    """One job on the shared stream: its session, the rows it has not used yet, and how far it is."""

    def __init__(self, context: Context, stage: Stage, stream: HubStream, normalize: str):
        from saehub.activations.batches import Batcher

        super().__init__(context, stage)
        self.scale_in = stream.scale(self.job.site, normalize)
        self.scale_out = stream.scale(self.job.target_site, normalize) if self.job.target_site else self.scale_in
        self.batcher = Batcher(self.job.batch)
        if self.job.init_from is not None:
            self.job = replace(self.job, init_from=self._start(self.job.init_from))
        self.open = partial(self.make().open, self.job, self._calibration(stream, normalize))
        """A fresh session of this job."""
        self.session = self.open()
        self.resume()
        self.batcher.carry = self.carry
        self.early = early_look(self)

    def _start(self, path: str) -> str:
        """The checkpoint to start from, in the units of the rows that the trainer will see: a checkpoint is in the model's, the rows are scaled."""
        from saehub.checkpoint.format import save
        from saehub.checkpoint.load import load

        if (self.scale_in, self.scale_out) == (1.0, 1.0):
            return path
        folder = self.context.plan.base / "work" / self.stage.key[:20] / "start"
        save(load(path).scale_input(1 / self.scale_in, 1 / self.scale_out), folder, overwrite=True)
        return str(folder)

    def _calibration(self, stream: HubStream, normalize: str) -> CalibrationRows:
        job = self.job
        target = stream.scaled_calibration(job.target_site, normalize) if job.target_site else None
        return CalibrationRows(stream.scaled_calibration(job.site, normalize), target)

    @property
    def next_row(self) -> int:
        """The stream row that this job needs next."""
        return self.step * self.job.batch + self.batcher.carried

    def feed(self, rows: dict[str, Tensor], stop: Any) -> None:
        """Take the steps that these rows (of this job's sites) fill; keep the rest.

        Stopped in between, the rows not used are dropped: `next_row` says where to go on, and that block is extracted again.
        """
        if stop.is_set():
            return
        scaled = {"x": rows[self.job.site].float() * self.scale_in}
        if self.job.target_site:
            scaled["y"] = rows[self.job.target_site].float() * self.scale_out
        waiting: list[dict[str, Tensor]] = []
        for batch in self.batcher.feed(scaled):
            waiting.append(batch)
            if len(waiting) == (REMOTE_STEPS if self.remote else 1):
                self._steps(waiting)
            if stop.is_set():
                break
        self._steps(waiting)

    def _steps(self, waiting: list[dict[str, Tensor]]) -> None:
        """Train on the batches in `waiting` and empty it; a worker takes many in one message."""
        if not waiting:
            return
        if self.remote:
            import torch

            x_ND, y_ND = (torch.cat([batch[name] for batch in waiting]) if name in waiting[0] else None for name in ("x", "y"))
            self.metrics = self.session.steps(x_ND, y_ND, self.job.batch)
        else:
            for batch in waiting:
                self.session.step(*(tensor.to(self.job.device) for tensor in batch.values()))
        self.step += len(waiting)
        waiting.clear()
        self.tell()

    def look(self) -> dict[str, float]:
        """Metrics of the last step: a worker sent them with it."""
        return self.metrics if self.remote else super().look()

    def save(self) -> None:
        """Write the state between two batches, with the rows that wait to be used."""
        self.carry = self.batcher.carry
        super().save()


def run_pass(context: Context, stages: list[Stage]) -> None:
    """Train every job of `stages` on the recipe's stream; a job that fails does not stop the others."""
    plan = context.plan
    recipe = plan.recipe
    sites = sorted({site for stage in stages for site in (stage.spec["job"].site, stage.spec["job"].target_site) if site})
    with open_stream(context, sites) as stream:
        trainees: list[Trainee] = []
        errors: list[SaehubError] = []
        for stage in stages:
            context.events("stage_started", stage.id, detail=stage.detail)
            trainee, error = attempt(context, stage, partial(Trainee, context, stage, stream, recipe.extract.normalize))
            trainees += [trainee] if trainee else []
            errors += [error] if error else []
        try:
            elapsed = _pass(context, stream, trainees) if trainees else 0.0
        except Interrupted as error:
            error.where = ", ".join(f"{trainee.job.id} at step {trainee.step:,} of {trainee.job.steps:,}" for trainee in trainees)
            raise
        for trainee in trainees:
            if trainee.error is None:
                _, trainee.error = attempt(context, trainee.stage, partial(_end, context, trainee, stream, elapsed))
    errors += [trainee.error for trainee in trainees if trainee.error]
    if errors:
        raise errors[0]


def _pass(context: Context, stream: HubStream, trainees: list[Trainee]) -> float:
    """Feed every block to every job from where they are; seconds that took."""
    start, begun = min(trainee.next_row for trainee in trainees), time.monotonic()
    for index in range(stream.block_of(start) if any(not t.done for t in trainees) else stream.n_blocks, stream.n_blocks):
        if all(trainee.done for trainee in trainees):
            break
        block = stream.block(index)
        for trainee in trainees:
            _feed(trainee, block, context)
        if context.stop.is_set():
            raise Interrupted("stopped; every job's state is saved", fix="the same command goes on from here")
        stream.used(index)
    return time.monotonic() - begun


def _feed(trainee: Trainee, block: Any, context: Context) -> None:
    first, count = block.first_row, next(iter(block.acts.values())).shape[0]
    if trainee.done or first + count <= trainee.next_row:
        return
    offset = max(0, trainee.next_row - first)
    wanted = [site for site in (trainee.job.site, trainee.job.target_site) if site]

    def work() -> None:
        rows = {site: block.acts[site][offset:] for site in wanted}
        if trainee.early is not None:
            rows = _feed_to_looks(trainee, rows, context)
        trainee.feed(rows, context.stop)
        trainee.save()

    _, trainee.error = attempt(context, trainee.stage, work)


def _feed_to_looks(trainee: Trainee, rows: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
    """Train up to each look that falls into these rows and take it; returns the rows that are left."""
    trainee.early.refuse()
    while (due := trainee.early.next_step()) is not None and not context.stop.is_set():
        needed = due * trainee.job.batch - trainee.next_row
        if needed > len(next(iter(rows.values()))):
            break
        trainee.feed({site: x_ND[:needed] for site, x_ND in rows.items()}, context.stop)
        rows = {site: x_ND[needed:] for site, x_ND in rows.items()}
        if trainee.step == due:  # else stopped on the way
            trainee.early.take()
    return rows


def _end(context: Context, trainee: Trainee, stream: HubStream, elapsed: float) -> None:
    trainee.tell(force=True)
    finish(context, trainee, stream, elapsed)


def attempt(context: Context, stage: Stage, work: Callable[[], Any]) -> tuple[Any, SaehubError | None]:
    """What `work` returns, or the error of this stage alone, told to the listeners: the other jobs go on. Not for interruptions and full disks."""
    from saehub.pipeline.context import stage_error
    from saehub.pipeline.workspace import disk_error

    try:
        return work(), None
    except Interrupted:
        raise
    except SaehubError as error:
        found = error
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and disk_error(error, context.plan.base):
            raise
        found = stage_error(stage, error)
        found.__cause__ = error
    failed(context, stage, found)
    return None, found


def failed(context: Context, stage: Stage, error: SaehubError) -> None:
    """Tell the listeners."""
    context.events("stage_failed", stage.id, error=error.to_json())


def finish(context: Context, trainee: Progress, stream: HubStream, elapsed: float) -> None:
    """Fold the stream's normalisation, attach provenance and the golden probe, and publish the checkpoint."""
    import torch

    from saehub.checkpoint.format import save
    from saehub.checkpoint.probe import make_probe

    job, stage, plan = trainee.job, trainee.stage, context.plan
    sae = trainee.trained().to("cpu")
    sae = sae.scale_input(trainee.scale_in, trainee.scale_out)
    sae.provenance.update(provenance(context, trainee, stream))
    learnt = [*(optional(trainee.session, "cautions") or ()), *still_at_the_start(trainee)]
    for text in learnt:
        context.events("warning", stage.id, text=text)
    if cautions := [*stage.spec["cautions"], *learnt]:
        sae.provenance["cautions"] = cautions
    bad = [name for name, tensor in sae.tensors().items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise StageFailed(f"{job.id} ended with values that are not finite in {', '.join(bad)}", where=stage.id, fix="a lower learning rate")
    rows = stream.probe_rows(PROBE_ROWS)
    target_ND = rows.acts[job.target_site] if job.target_site else None
    probe = make_probe(sae, rows.acts[job.site], rows.token_ids_N, rows.positions_N, rows.contexts_NT, target_ND=target_ND)
    manifest = context.manifest(stage, metrics=trainee.metrics, seconds=elapsed, rows=trainee.step * job.batch, job=asdict(job), cautions=learnt)
    manifest["early"] = trainee.early.taken if trainee.early else []
    with plan.store.create("train", stage.key, manifest) as folder:
        save(sae, folder / "checkpoint", probe=probe)
    drop_states(trainee.folder)
    context.events("stage_finished", stage.id, seconds=elapsed, metrics=trainee.metrics, path=str(stage.where))


def still_at_the_start(trainee: Progress) -> list[str]:
    """A caution where training changed nothing that matters."""
    if trainee.moved is None or trainee.moved >= UNMOVED:
        return []
    return [f"its weights moved by {trainee.moved:.2g} of their norm: it is still its initial state; check the learning rate and the number of steps"]


def provenance(context: Context, trainee: Progress, stream: HubStream) -> dict[str, Any]:
    """Where a checkpoint comes from: the part of saehub.json that is not mathematics."""
    from saehub.pipeline.keys import plain_config

    plan, job = context.plan, trainee.job
    recipe, train = plan.recipe, plan.recipe.data.train if plan.recipe.data else None
    registered = plan.catalog.find("trainer", trainee.stage.component)
    tokens = context.tokens("train") if plan.of("tokens") else None
    model = plan.model
    return {
        "site": job.site,
        "target_site": job.target_site,
        "model": {**asdict(model), "fingerprint": context.model.fingerprint, "weight_processing": "none"} if model else None,
        "tokens": {
            "context": train.context,
            "bos": train.bos,
            "exclude": list(train.exclude),
            "template": train.template,
            "tokenizer_hash": tokens.manifest["tokenizer"]["hash"],
        }
        if tokens and train
        else None,
        "data": {
            "hash": tokens.hash if tokens else None,
            "stream_hash": stream.hash_of([site for site in (job.site, job.target_site) if site]),
            "tokens_trained": trainee.step * job.batch,
            "sources": [asdict(entry) for entry in train.mix] if train else [],
        },
        "trainer": {
            "component": registered.address,
            "distribution": registered.distribution,
            "version": registered.version,
            "config": plain_config(trainee.stage.spec["config"]),
            "seed": job.seed,
            "job": job.id,
            "normalize": recipe.extract.normalize,
            "scale": trainee.scale_in,
            "moved": trainee.moved,
        },
        "libraries": context.environment["libraries"],
    }


def open_stream(context: Context, sites: list[str]) -> Any:
    """The recipe's block stream over `sites`, stored as the plan chose; a context manager that closes the extractor."""
    from saehub.pipeline.stream import HubStream

    return HubStream(context, sites, derive("stream", context.plan.recipe.seed))
