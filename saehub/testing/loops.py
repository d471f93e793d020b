"""A trainer that runs the language model itself in; checks on determinism, stopping, an untouched model, honest refusal and a falling loss out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saehub.api import Job, LoopSession
from saehub.errors import UsageError
from saehub.testing.conformance import Subject, common_checks, difference, expect, other_random_state, raises_cleanly, resolve, scratch, world_unchanged
from saehub.testing.stage import CONTEXT, Stage

SHORT = 12
"""Steps of the runs that are compared."""
GAP = 1e-3
"""What a resumed run may differ by, relative to the largest weight: bit-identity is not promised, going on is."""


class LoopBench:
    """A tiny model, its texts, a job on its residual stream, and short runs of the trainer under test."""

    def __init__(self, subject: Subject, stage: Stage, steps: int):
        self.subject, self.stage = subject, stage
        self.batch = int(getattr(subject.config, "batch", 4 * CONTEXT))
        rows = steps * self.batch
        self.tokens = stage.tokens(rows=min(rows, 1500))
        d = stage.model.shape.d_model
        self.job = Job("conformance", "resid_post.0", None, d, d, steps, self.batch, rows, seed=0)

    def short(self, **changes: Any) -> Job:
        """The same job with SHORT steps."""
        return replace(self.job, steps=SHORT, rows=SHORT * self.batch, **changes)

    def open(self, job: Job) -> LoopSession:
        """A session of a fresh trainer."""
        return self.subject.make().open(job, self.stage.model, self.tokens)

    def train(self, job: Job, steps: int | None = None, session: LoopSession | None = None, start: int = 0) -> LoopSession:
        """Steps start … steps of a job."""
        session = session or self.open(job)
        for _ in range(start, job.steps if steps is None else steps):
            session.advance()
        return session


def loop_checks(
    subject: Subject, stage: Stage, steps: int, component: Any, with_: Mapping[str, Any] | None, refuses: Iterable[Mapping[str, Any]]
) -> list[tuple[str, Callable[[], str | None]]]:
    """Everything that `saehub.api.LoopTrainer` promises, on a tiny Llama."""
    from saehub.testing import trainers

    bench = LoopBench(subject, stage, steps)
    return [
        *common_checks(subject),
        ("says what it will do", lambda: trainers.says_what_it_will_do(bench)),
        ("same job, same bytes", lambda: trainers.deterministic(bench)),
        ("goes on where it stopped", lambda: _goes_on(bench)),
        ("model and surroundings untouched", lambda: _untouched(bench)),
        ("metrics", lambda: trainers.metrics(bench)),
        ("a valid SAE", lambda: trainers.valid_sae(bench)),
        ("impossible jobs refused", lambda: _refuses(bench, component, with_, list(refuses))),
        ("lowers its loss", lambda: _learns(bench)),
    ]


def _goes_on(bench: LoopBench) -> str:
    from safetensors.torch import load_file, save_file

    job, half = bench.short(), SHORT // 2
    whole = bench.train(job).finish().tensors()
    tensors, data = bench.train(job, half).state()
    with scratch() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        text, loaded = json.dumps(data, allow_nan=False), load_file(path)
    second = bench.open(job)
    with other_random_state(5):
        second.load_state(loaded, json.loads(text))
        resumed = bench.train(job, session=second, start=half).finish().tensors()
    gap = difference(whole, resumed)
    worst = max(float((whole[name] - resumed[name]).abs().max() / whole[name].abs().max().clamp_min(1e-12)) for name in whole)
    expect(worst <= GAP, f"stopped at step {half} and gone on: {gap}")
    return f"within {worst:.2g} of the largest weight" if gap else "bit-identical"


def _untouched(bench: LoopBench) -> str:
    before = {name: value.clone() for name, value in bench.stage.model.hf.state_dict().items()}
    with world_unchanged():
        session = bench.train(bench.short(), 4)
        session.metrics()
        session.load_state(*session.state())
        session.finish()
    gap = difference(before, bench.stage.model.hf.state_dict())
    expect(not gap, f"the model was changed: {gap}")
    return ""


def _refuses(bench: LoopBench, component: Any, with_: Mapping[str, Any] | None, refuses: list[Mapping[str, Any]]) -> str:
    model, context = bench.stage.model, bench.tokens.context
    impossible = bench.short(d_out=bench.job.d_in + 1)
    expect(list(bench.subject.config.check(impossible)), "check(job) accepts an autoencoder with d_in != d_out (and no target site)")
    raises_cleanly(lambda: bench.open(impossible), "open() with a job that check(job) refuses")
    for settings in refuses:
        try:
            config = resolve("trainer", component, {**(with_ or {}), **settings}).config
        except UsageError:
            continue  # refused by validation, earlier still
        found = [*config.check(bench.job), *(config.check_model(bench.job, model.shape, context) if hasattr(config, "check_model") else ())]
        expect(found, f"check(job) accepts {dict(settings)}")
        raises_cleanly(lambda config=config: bench.subject.make(config).open(bench.job, model, bench.tokens), f"open() with {dict(settings)}")
    return f"{len(refuses) + 1} refused"


def _learns(bench: LoopBench) -> str:
    session, losses = bench.open(bench.job), []
    for _ in range(bench.job.steps):
        session.advance()
        losses.append(session.metrics()["loss"])
    few = max(1, len(losses) // 5)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    expect(last < first, f"the loss goes from {first:.4g} (first {few} steps) to {last:.4g}")
    return f"loss {first:.3g} to {last:.3g} in {len(losses)} steps"
