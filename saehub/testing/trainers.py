"""A trainer in; a report out on determinism, resume, untouched inputs, honest refusal and recovery of planted features."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import CalibrationRows, Job, Trainer, TrainerSession, owns_its_loop
from saehub.errors import UsageError
from saehub.testing.conformance import (
    ConformanceReport,
    Subject,
    common_checks,
    difference,
    expect,
    other_random_state,
    raises_cleanly,
    resolve,
    run_checks,
    scratch,
    world_unchanged,
)
from saehub.testing.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE
    from saehub.pipeline.components import Components

SHORT = 24
"""Steps of the runs that are compared bit for bit."""


class Bench:
    """Planted data, a job over it, and short runs of the trainer under test."""

    def __init__(self, subject: Subject, d: int, n_features: int, l0: float, steps: int, device: str, transcoder: bool = False):
        from saehub.testing.toys import planted

        self.subject = subject
        self.batch = int(getattr(subject.config, "batch", 256))
        rows = steps * self.batch
        x_ND, self.dictionary_FD = planted(rows + 8192, d, n_features, l0, seed=3)
        self.y_ND, held_ND = None, None
        if transcoder:  # the same activations in another dictionary
            y_ND, self.dictionary_FD = planted(rows + 8192, d, n_features, l0, seed=3, features=5)
            self.y_ND, held_ND = y_ND[:rows].to(device), y_ND[rows:].to(device)
        self.x_ND, self.pool = x_ND[:rows].to(device), CalibrationRows(x_ND[rows:].to(device), held_ND)
        self.pristine = self.pool.x_ND.clone()
        self.job = Job(
            id="conformance",
            site="resid_post.0",
            target_site="mlp_out.0" if transcoder else None,
            d_in=d,
            d_out=d,
            steps=steps,
            batch=self.batch,
            rows=rows,
            seed=0,
            device=device,
        )

    def short(self, **changes: Any) -> Job:
        """The same job with SHORT steps."""
        return replace(self.job, steps=SHORT, rows=SHORT * self.batch, **changes)

    def batch_at(self, step: int) -> Tensor:
        """The rows of one step, a copy of its own."""
        return self.x_ND[step * self.batch : (step + 1) * self.batch].clone()

    def targets_at(self, step: int) -> tuple[Tensor, ...]:
        """The targets of one step, a copy of their own; empty for an autoencoder."""
        return () if self.y_ND is None else (self.y_ND[step * self.batch : (step + 1) * self.batch].clone(),)

    def open(self, job: Job) -> TrainerSession:
        """A session of a fresh trainer."""
        trainer: Trainer = self.subject.make()
        return trainer.open(job, self.pool)

    def train(self, job: Job, steps: int | None = None, session: TrainerSession | None = None, start: int = 0) -> TrainerSession:
        """Steps start … steps of a job; where the session is in a worker, many in one message, as in a run."""
        from saehub.pipeline.components import Remote

        session, stop = session or self.open(job), job.steps if steps is None else steps
        remote = isinstance(session, Remote)
        for step in range(start, stop, 64 if remote else 1):
            rows = slice(step * self.batch, min(step + (64 if remote else 1), stop) * self.batch)
            x_ND, y_ND = self.x_ND[rows].clone(), None if self.y_ND is None else self.y_ND[rows].clone()
            if remote:
                session.steps(x_ND, y_ND, self.batch)
            else:
                session.step(x_ND, *(() if y_ND is None else (y_ND,)))
        return session


def check_trainer(
    component: Any,
    with_: Mapping[str, Any] | None = None,
    *,
    d: int = 32,
    n_features: int = 64,
    l0: float = 4.0,
    steps: int = 400,
    recover: float = 0.8,
    transcoder: bool = False,
    refuses: Iterable[Mapping[str, Any]] = (),
    device: str = "cpu",
    only: Collection[str] | None = None,
    workers: Components | None = None,
    stage: Stage | None = None,
) -> ConformanceReport:
    """Everything that `saehub.api.Trainer` promises, on planted features; or `LoopTrainer`, on a tiny Llama, where it `needs` the model.

    Args:
        component: `"plugin/name"`, a `Registered`, or `(Class, config)`.
        with_: settings, as in a recipe (the first two forms). Give the dictionary at least `n_features` latents.
        d, n_features, l0, steps: size of the planted problem; the batch is the config's.
        recover: mean max cosine that the learned decoder must reach with the planted features (random rows reach about 0.4 at the defaults).
        transcoder: for a trainer of transcoders only: every check gives it targets, the planted activations in another dictionary.
        refuses: settings that the trainer must refuse, such as `[{"k": 100_000}]`.
        device: where it trains.
        only: names of the checks to run; None: all.
        workers: worker processes to use and to leave running, so that several components share one import of their library; None: own ones.
        stage: for a trainer that needs the model: a tiny model and texts to reuse between suites; None: new ones.
    """
    subject = resolve("trainer", component, with_, workers)
    if subject.registered is not None and owns_its_loop(subject.registered.component):
        from saehub.testing.loops import loop_checks

        with scratch() as folder:
            found = loop_checks(subject, stage or Stage(Path(folder)), steps, component, with_, refuses)
            return run_checks("trainer", subject.name, found, only, subject.close)
    bench = Bench(subject, d, n_features, l0, steps, device, transcoder)
    checks: list[tuple[str, Callable[[], str | None]]] = [
        *common_checks(subject),
        ("says what it will do", lambda: says_what_it_will_do(bench)),
        ("same job, same bytes", lambda: deterministic(bench)),
        ("jobs side by side as alone", lambda: _side_by_side(bench)),
        ("save and restore", lambda: _save_and_restore(bench)),
        ("inputs untouched", lambda: _inputs_untouched(bench)),
        ("surroundings untouched", lambda: _surroundings(bench)),
        ("metrics", lambda: metrics(bench)),
        ("a valid SAE", lambda: valid_sae(bench)),
        ("transcoders done or refused", lambda: _transcoder(bench)),
        ("impossible jobs refused", lambda: _refuses(bench, subject, component, with_, list(refuses))),
        ("warm start done or refused", lambda: _warm_start(bench)),
        ("finds planted features", lambda: _recovers(bench, recover)),
    ]
    return run_checks("trainer", subject.name, checks, only, subject.close)


def _problems(bench: Bench, job: Job) -> list[str] | None:
    """What the config says against a job; None when it has no `check`."""
    check = bench.subject.config_check
    if check is None:
        return None
    problems = list(check(job))
    expect(all(isinstance(text, str) and text for text in problems), f"check(job) must yield non-empty strings, not {problems!r}")
    return problems


def says_what_it_will_do(bench: Bench) -> str:
    """The config knows the job's sizes, and refuses nothing."""
    problems = _problems(bench, bench.job)
    expect(not problems, f"check(job) refuses the job of this suite: {problems}")
    config, said = bench.subject.config, []
    expect(isinstance(getattr(config, "batch", None), int), "the config has no `batch: int`, so steps cannot be planned")
    for name, kind in (("d_sae", int), ("memory", int)):
        if hasattr(config, name):
            value = getattr(config, name)(bench.job)
            expect(isinstance(value, kind) and value > 0, f"{name}(job) is {value!r}")
            said.append(f"{name} {value}")
    if hasattr(config, "architecture"):
        word = config.architecture()
        expect(isinstance(word, str) and word, f"architecture() is {word!r}")
        said.append(word)
    return ", ".join(said)


def deterministic(bench: Bench) -> str:
    """A job depends on nothing but itself."""
    finals = []
    for seed in (1, 2):
        with other_random_state(seed):
            session = bench.train(bench.short())
            finals.append((session.finish().tensors(), session.state()[0]))
    (sae, state), (sae_again, state_again) = finals
    for what, gap in (("the SAE", difference(sae, sae_again)), ("the state", difference(state, state_again))):
        expect(not gap, f"two runs of one job under other global random states: {what}: {gap}")
    return f"{SHORT} steps twice, {len(sae)} tensors"


def _side_by_side(bench: Bench) -> str:
    jobs = [bench.short(), bench.short(id="conformance-b", seed=1)]
    alone = [bench.train(job).finish().tensors() for job in jobs]
    together = [bench.open(job) for job in jobs]
    for step in range(SHORT):
        for session in together:
            session.step(bench.batch_at(step), *bench.targets_at(step))
    for tensors, session in zip(alone, together, strict=True):
        gap = difference(tensors, session.finish().tensors())
        expect(not gap, f"a job that shares the stream with another ends elsewhere than alone: {gap}")
    return "two jobs in turn"


def _save_and_restore(bench: Bench) -> str:
    from safetensors.torch import load_file, save_file

    job, half = bench.short(), SHORT // 2
    whole = bench.train(job)
    first = bench.train(job, half)
    tensors, data = first.state()
    with scratch() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        text = json.dumps(data, allow_nan=False)
        loaded = load_file(path)
    second = bench.open(job)
    with other_random_state(5):
        second.load_state(loaded, json.loads(text))
        gap = difference(tensors_on_cpu(tensors), tensors_on_cpu(second.state()[0]))
        expect(not gap, f"state after load_state is not what was loaded: {gap}")
        expect(
            json.dumps(second.state()[1], sort_keys=True) == json.dumps(json.loads(text), sort_keys=True),
            "the JSON part of the state changed",
        )
        bench.train(job, session=second, start=half)
    for what, left, right in (
        ("the SAE", whole.finish().tensors(), second.finish().tensors()),
        ("the state", tensors_on_cpu(whole.state()[0]), tensors_on_cpu(second.state()[0])),
    ):
        gap = difference(left, right)
        expect(not gap, f"stopped at step {half} and restored: {what}: {gap}")
    return f"{len(tensors)} tensors and {len(data)} values through safetensors and JSON"


def tensors_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _inputs_untouched(bench: Bench) -> str:
    import torch

    session = bench.open(bench.short())
    expect(torch.equal(bench.pristine, bench.pool.x_ND), "open() changed the calibration rows")
    for step in range(3):
        x_BD = bench.batch_at(step)
        kept = x_BD.clone()
        session.step(x_BD, *bench.targets_at(step))
        expect(torch.equal(kept, x_BD) and not x_BD.requires_grad, f"step {step} changed its rows")
    # A batch that is overwritten after the step (the hub reuses its buffers) must not matter.
    left, right = bench.open(bench.short()), bench.open(bench.short())
    for step in range(6):
        reused = bench.batch_at(step)
        left.step(reused, *bench.targets_at(step))
        reused.fill_(float("nan"))
        right.step(bench.batch_at(step), *bench.targets_at(step))
    gap = difference(left.finish().tensors(), right.finish().tensors())
    expect(not gap, f"rows are kept by reference after step(): {gap}")
    return ""


def _surroundings(bench: Bench) -> str:
    import torch

    with world_unchanged():
        session = bench.train(bench.short(), 4)
        session.metrics()
        session.load_state(*session.state())
        session.finish()
    with torch.no_grad():  # the hub may hold gradients off around a step
        held = bench.train(bench.short(), 4).finish().tensors()
    gap = difference(held, bench.train(bench.short(), 4).finish().tensors())
    expect(not gap, f"steps under torch.no_grad() end elsewhere: {gap}")
    return "random states, gradient mode, dtype, threads, precision, environment"


def metrics(bench: Bench) -> str:
    """At least a loss; finite numbers."""
    session = bench.train(bench.short(), 4)
    found = session.metrics()
    expect("loss" in found, f"metrics() has no `loss`: {sorted(found)}")
    for name, value in found.items():
        expect(isinstance(value, (int, float)) and value == value and abs(value) < float("inf"), f"metrics()[{name!r}] is {value!r}")
    json.dumps(found)
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def valid_sae(bench: Bench) -> str:
    """What was announced, in float32, and the same after a trip to disk."""
    import torch

    from saehub.checkpoint.format import save
    from saehub.checkpoint.load import load

    sae = bench.train(bench.short()).finish()
    config, job = bench.subject.config, bench.job
    expect((sae.config.d_in, sae.config.d_out) == (job.d_in, job.d_out), f"widths are {sae.config.d_in} and {sae.config.d_out}")
    if hasattr(config, "d_sae"):
        expect(sae.config.d_sae == config.d_sae(job), f"d_sae is {sae.config.d_sae}, the config said {config.d_sae(job)}")
    if hasattr(config, "architecture"):
        expect(
            sae.config.architecture == config.architecture(),
            f"architecture is {sae.config.architecture}, the config said {config.architecture()}",
        )
    for name, tensor in sae.tensors().items():
        expect(not tensor.is_floating_point() or tensor.dtype == torch.float32, f"{name} is {tensor.dtype}, not float32")
        expect(not tensor.requires_grad, f"{name} requires a gradient")
    with scratch() as folder:
        save(sae, Path(folder) / "sae")
        gap = difference(sae.tensors(), load(Path(folder) / "sae").tensors())
    expect(not gap, f"saved and loaded: {gap}")
    return f"{sae.config.architecture}, {job.d_in} -> {sae.config.d_sae} -> {job.d_out}"


def _transcoder(bench: Bench) -> str:
    from saehub.testing.toys import planted

    y_ND, _ = planted(len(bench.x_ND) + len(bench.pool.x_ND), bench.job.d_in + 8, len(bench.dictionary_FD), 4.0, seed=4)
    job = bench.short(id="conformance-t", target_site="mlp_out.0", d_out=y_ND.shape[1])
    y_ND = y_ND.to(bench.x_ND.device)
    pool = CalibrationRows(bench.pool.x_ND, y_ND[len(bench.x_ND) :])
    problems = _problems(bench, job)
    if problems:
        raises_cleanly(lambda: bench.subject.make().open(job, pool), "open() with a job that check(job) refuses")
        return f"refused: {problems[0]}"

    def run() -> SAE:
        session = bench.subject.make().open(job, pool)
        for step in range(3):
            y_BD = y_ND[step * bench.batch : (step + 1) * bench.batch].clone()
            kept = y_BD.clone()
            session.step(bench.batch_at(step), y_BD)
            expect(bool((kept == y_BD).all()), "step changed its targets")
        return session.finish()

    if problems is None:
        try:
            sae = run()
        except Exception as error:
            raise UsageError(f"a transcoder fails only once it runs ({error})", fix="give the config a check(job) that says so") from error
    else:
        sae = run()
    expect(
        sae.config.kind != "autoencoder" and sae.config.d_out == job.d_out,
        f"a job with a target site gave an SAE of kind {sae.config.kind}",
    )
    return f"{sae.config.kind}, {job.d_in} -> {job.d_out}"


def _refuses(bench: Bench, subject: Subject, component: Any, with_: Mapping[str, Any] | None, refuses: list[Mapping[str, Any]]) -> str:
    # An autoencoder whose output is wider than its input does not exist: said before work starts, and not begun.
    impossible = bench.short(target_site=None, d_out=bench.job.d_in + 1)
    problems = _problems(bench, impossible)
    expect(problems, "check(job) accepts an autoencoder with d_in != d_out (and no target site)")
    raises_cleanly(lambda: bench.open(impossible), "open() with a job that check(job) refuses")
    few = CalibrationRows(bench.pool.x_ND[:2])
    try:
        subject.make().open(bench.short(), few)
    except Exception as error:
        message = str(error).splitlines()[0] if isinstance(error, UsageError) else ""
        expect("2 exist" in message, f"with 2 calibration rows open() raised {type(error).__name__}: {error}; let the hub's error through")
    for settings in refuses:
        if isinstance(component, tuple):
            config = replace(subject.config, **settings)
        else:
            try:
                config = resolve("trainer", component, {**(with_ or {}), **settings}).config
            except UsageError:
                continue  # refused by validation, earlier still
        found = list(config.check(bench.job)) if hasattr(config, "check") else []
        expect(found, f"check(job) accepts {dict(settings)}")
        raises_cleanly(lambda config=config: subject.make(config).open(bench.job, bench.pool), f"open() with {dict(settings)}")
    return problems[0]


def _warm_start(bench: Bench) -> str:
    from saehub.checkpoint.format import save

    trained = bench.train(bench.job).finish()
    with scratch() as folder:
        path = Path(folder) / "start"
        save(trained, path)
        warm_job = bench.short(init_from=str(path))
        problems = _problems(bench, warm_job)
        if problems:
            raises_cleanly(lambda: bench.open(warm_job), "open() with a job that check(job) refuses")
            return f"refused: {problems[0]}"
        warm, cold = bench.open(warm_job), bench.open(bench.short())
        for session in (warm, cold):
            session.step(bench.batch_at(0), *bench.targets_at(0))
    first, scratch_loss = warm.metrics()["loss"], cold.metrics()["loss"]
    expect(first < scratch_loss, f"init_from is ignored: first loss {first:.4g} from a trained SAE, {scratch_loss:.4g} from scratch")
    return f"first loss {first:.3g}, from scratch {scratch_loss:.3g}"


def _recovers(bench: Bench, recover: float) -> str:
    import torch

    from saehub.testing.toys import mmcs

    sae = bench.train(bench.job).finish()
    decoder_GD = decoder_rows(sae).cpu()
    random_GD = torch.randn(decoder_GD.shape, generator=torch.Generator().manual_seed(0))
    found, chance = mmcs(bench.dictionary_FD, decoder_GD), mmcs(bench.dictionary_FD, random_GD)
    x_ND = bench.pool.x_ND
    y_ND = x_ND if bench.pool.y_ND is None else bench.pool.y_ND
    with torch.no_grad():
        fvu = float((sae(x_ND) - y_ND).double().square().sum() / (y_ND - y_ND.mean(0)).double().square().sum())
    seen = f"MMCS {found:.3f} (random rows {chance:.3f}, bound {recover:.2f}), held-out FVU {fvu:.3f}"
    expect(found >= recover and found > chance + 0.1, f"planted features not found: {seen}")
    expect(fvu < 0.9, f"the SAE does not reconstruct rows in the units it was given: {seen}")
    return seen


def decoder_rows(sae: SAE) -> Tensor:
    """What each latent adds to the reconstruction, [d_sae, d_out]: W_dec where there is one, else the decoder's response to one latent."""
    import torch

    tensors = sae.tensors()
    if "W_dec" in tensors:
        return tensors["W_dec"].float()
    one = torch.eye(sae.config.d_sae)
    origin = torch.zeros(sae.config.d_sae, sae.config.d_in)
    with torch.no_grad():
        return sae.decode(one, like=origin) - sae.decode(torch.zeros_like(one), like=origin)
