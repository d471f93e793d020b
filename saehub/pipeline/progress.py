"""A training stage in; its session, its metrics as events, and its states on disk, from which it goes on, out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from saehub.api import Job
from saehub.errors import SaehubError, StageFailed
from saehub.pipeline import movement
from saehub.pipeline.cautions import inexact_resume
from saehub.pipeline.components import Remote
from saehub.pipeline.resume import State, load_state, save_state

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Stage

REPORT_SECONDS = 0.5


class Progress:
    """One job under way: its session, how far it is, and its states on disk."""

    session: Any
    early: Any = None
    """Looks on the way (`saehub.pipeline.early`)."""
    scale_in = scale_out = 1.0

    def __init__(self, context: Context, stage: Stage):
        self.context, self.stage = context, stage
        self.job: Job = replace(stage.spec["job"], device=context.device)
        self.folder = context.plan.store.state_path(stage.key)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.error: SaehubError | None = None
        self.carry: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        """What the matrices were at the first step (`saehub.pipeline.movement`); empty for a warm start, which may well stay where it is."""
        self.moved: float | None = None
        """How far they have moved since, when the state was last written."""

    def make(self) -> Any:
        """The stage's trainer, here or in its worker."""
        registered = self.context.plan.catalog.find("trainer", self.stage.component)
        return self.context.components.make(registered, self.stage.spec["config"])

    @property
    def remote(self) -> bool:
        """Whether the session lives in a worker."""
        return isinstance(self.session, Remote)

    def resume(self) -> None:
        """Go on from the newest whole state, if there is one."""
        from saehub.pipeline.environment import differences

        if self.session is None:
            self._returned("open", None, "a session")
        state, skipped = load_state(self.folder)
        for text in skipped:
            self.context.events("warning", self.stage.id, text=f"a saved state is broken and was passed over: {text}")
        cold = self.job.init_from is None
        if state is None:
            if cold:
                self.start = movement.sketch(self.state()[0])
                movement.write(self.start, self.folder)
            return
        self.start = movement.read(self.folder) if cold else {}
        self.moved = movement.moved(self.start, movement.sketch(state.tensors))
        self.session.load_state(state.tensors, state.data)
        self.step, self.carry = state.step, state.carry
        changed = differences(state.environment, self.context.environment)
        promise = inexact_resume(self.stage.spec["config"], self.job)
        promise = promise or ("a trainer that runs the model itself promises none" if self.stage.spec["own_loop"] else None)
        changed += [promise] if promise else []
        if changed:
            self.context.events("warning", self.stage.id, text=f"resume: inexact ({'; '.join(changed)})")
        exact = not changed and self.context.facts["resume"] != "inexact"
        self.context.facts["resume"] = "exact" if exact else "inexact"
        self.context.facts.setdefault("resume_changes", []).extend(changed)
        self.context.events("log", self.stage.id, text=f"going on from step {self.step} of {self.job.steps}")

    @property
    def done(self) -> bool:
        """All steps taken, or failed."""
        return self.step >= self.job.steps or self.error is not None

    _told = 0.0

    def tell(self, force: bool = False) -> None:
        """Metrics to the event stream, twice a second at most (reading them can wait for the device)."""
        now = time.monotonic()
        if not force and now - self._told < REPORT_SECONDS:
            return
        self._told = now
        self.metrics = self.look()
        loss = self.metrics.get("loss")
        self.context.events("progress", self.stage.id, done=self.step, total=self.job.steps, unit="steps", rows=self.step * self.job.batch, metrics=self.metrics)
        if loss is not None and loss != loss:
            raise StageFailed(
                f"the loss of {self.job.id} is NaN at step {self.step} of {self.job.steps}",
                where=self.stage.id,
                why="learning rate too high, or activations that overflow the stream's dtype",
                fix="a lower lr, extract.dtype: float32, or extract.normalize: sqrt_d; the state before it is kept",
            )

    def look(self) -> dict[str, float]:
        """Metrics of the last step."""
        found = self.session.metrics()
        number = lambda value: isinstance(value, float) or isinstance(value, int) and abs(value) < 2**1000  # noqa: E731  (what a float can hold)
        good = isinstance(found, Mapping) and all(isinstance(name, str) and number(value) for name, value in found.items())
        return found if good else self._returned("metrics", found, "a map of names to numbers (float(…) makes one of a tensor)")

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What the session needs to go on."""
        from torch import Tensor

        found = self.session.state()
        good = isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, dict) for part in found)
        if not good or not all(isinstance(value, Tensor) for value in found[0].values()):
            self._returned("state", found, "a tuple: a map of tensors, and a map of plain data")
        return found

    def trained(self) -> Any:
        """The SAE that the session ends with."""
        from saehub.checkpoint.sae import SAE

        found, job = self.session.finish(), self.job
        if not isinstance(found, SAE):
            self._returned("finish", found, "a saehub.SAE")
        if (found.config.d_in, found.config.d_out) != (job.d_in, job.d_out):
            sizes = f"{found.config.d_in} -> {found.config.d_out}"
            raise StageFailed(f"finish of {self.stage.component} returned an SAE of widths {sizes}", where=self.stage.id, fix=f"this job is {job.d_in} -> {job.d_out}")
        return found

    def _returned(self, method: str, found: Any, expected: str) -> NoReturn:
        what = "nothing (None)" if found is None else f"{found!r:.80}, a {type(found).__name__}"
        raise StageFailed(f"{method} of {self.stage.component} returned {what}", where=self.stage.id, fix=f"it returns {expected}: see saehub.api.TrainerSession")

    def save(self) -> None:
        """Write the state between two batches."""
        tensors, data = self.state()
        self.moved = movement.moved(self.start, movement.sketch(tensors))
        save_state(self.folder, State(self.step, tensors, data, self.carry, self.context.environment))
