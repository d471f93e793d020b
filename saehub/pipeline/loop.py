"""A training stage whose trainer runs the language model itself in; its checkpoint out. No block is extracted for it, but rows for its golden probe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from saehub.errors import Interrupted, SaehubError
from saehub.pipeline.context import stage_error
from saehub.pipeline.progress import Progress
from saehub.pipeline.train import failed, finish, open_stream

if TYPE_CHECKING:
    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Stage

SAVE_SECONDS = 30.0


class Looper(Progress):
    """One job whose session advances by itself."""

    def __init__(self, context: Context, stage: Stage):
        super().__init__(context, stage)
        self.session = self.make().open(self.job, context.model, context.tokens("train"))
        self.resume()

    def run(self) -> None:
        """The steps that are left; the state is saved now and then, and when the run is stopped."""
        saved = time.monotonic()
        while not self.done:
            self.session.advance()
            self.step += 1
            self.tell()
            stopped = self.context.stop.is_set()
            if stopped or time.monotonic() - saved > SAVE_SECONDS or self.done:
                self.save()
                saved = time.monotonic()
            if stopped and not self.done:
                raise Interrupted(
                    "stopped; the job's state is saved",
                    where=f"{self.job.id} at step {self.step:,} of {self.job.steps:,}",
                    fix="the same command goes on from here",
                )
        self.tell(force=True)


def run_loop(context: Context, stage: Stage) -> None:
    """Train one SAE through the model, and publish it."""
    context.events("stage_started", stage.id, detail=stage.detail)
    started, job = time.monotonic(), stage.spec["job"]
    try:
        looper = Looper(context, stage)
        looper.run()
        with open_stream(context, sorted({job.site, job.target_site or job.site})) as stream:
            finish(context, looper, stream, time.monotonic() - started)
    except Interrupted:
        raise
    except Exception as error:
        failed(context, stage, error if isinstance(error, SaehubError) else stage_error(stage, error))
        raise
