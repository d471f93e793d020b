"""Batches of rows in, a trained SAE out: the loop that all native architectures share, which can stop and go on between any two steps."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.errors import FormatError, StageFailed, UsageError
from saehub.seeds import generator
from saehub_native.kernels import pick
from saehub_native.kernels.lazy import RowSums
from saehub_native.kernels.replay import Replay, why_not
from saehub_native.optim import clip, scale
from saehub_native.optim_libraries import make
from saehub_native.schedule import lr_factor

if TYPE_CHECKING:
    from saehub.api import Calibration, Job
    from saehub.checkpoint.sae import SAE
    from saehub_native.architectures import Architecture
    from saehub_native.config import TrainConfig

CHECK_EVERY = 32  # steps between two looks at the loss where a look stalls the device


class NativeTrainer:
    """Implements `saehub.api.Trainer` for every config that names an `objective`."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def open(self, job: Job, calibration: Calibration) -> NativeSession:
        """One SAE, initialised from calibration rows. Raises UsageError for settings that do not fit the job."""
        problems = list(self.config.check(job))
        if problems:
            raise UsageError(f"{job.id} cannot be trained: " + "; ".join(problems), where=f"train {job.id}", fix="saehub recipe check")
        return NativeSession(self.config, job, calibration)


class NativeSession:
    """Implements `saehub.api.TrainerSession`: parameters, optimizer, counters; no global random state, no gradient graph."""

    @torch.no_grad()
    def __init__(self, config: TrainConfig, job: Job, calibration: Calibration):
        self.config, self.job = config, job
        self.kernels = pick(job.device)
        module, _, name = config.objective.partition(":")
        self.architecture: Architecture = getattr(import_module(module), name)(config, job, self.kernels)
        self.calibration = calibration
        x_ND, y_ND = self._calibration_rows()
        params = self.architecture.init(x_ND, y_ND, generator(job.id, job.seed, "init"))
        if job.init_from is not None:
            params = {name: p.to(job.device) for name, p in self._warm_start(job.init_from).items()}
        self.params = params
        self.optimizer = make(config, {name: p for name, p in params.items() if name not in config.frozen})
        self.kernels.lazy = self._takes_row_sums()
        self.replay = self._replay()
        self.steps_done = 0
        self.since_fired_F = torch.zeros(config.d_sae(job), dtype=torch.int64, device=job.device)
        self.dead_rows = config.dead_rows(job)
        self._last: dict[str, Tensor | float] = {}

    def _takes_row_sums(self) -> bool:
        """Whether gradients that are never held whole suit both who makes them and who uses them."""
        formed = self.config.adam_bits == 32 or self.kernels.name == "gpu"
        return self.config.optimizer == "adam" and formed and getattr(self.architecture, "takes_row_sums", False)

    def _replay(self) -> Replay | None:
        """The step in a form that a GPU can be handed whole; None where it has to be led through it."""
        if why_not(self.config, self.architecture, self.kernels) is not None:
            return None
        return Replay(self._work, self.optimizer, self.kernels, self.params["W_enc"])

    def _calibration_rows(self) -> tuple[Tensor, Tensor]:
        config, job = self.config, self.job
        x_ND, y_ND = self.calibration(min(config.calibration, job.calibration or config.calibration))
        x_ND = self._rows(x_ND, job.d_in, "calibration rows")
        return x_ND, x_ND if y_ND is None else self._rows(y_ND, job.d_out, "calibration targets")

    def _rows(self, rows: Tensor, width: int, what: str) -> Tensor:
        if rows.ndim != 2 or rows.shape[1] != width:
            raise StageFailed(
                f"{what} have shape {list(rows.shape)}", where=f"train {self.job.id}", why=f"[rows, {width}] was expected at {self.job.site}"
            )
        return rows.detach().to(self.job.device, torch.float32)

    def _warm_start(self, path: str) -> dict[str, Tensor]:
        from saehub.checkpoint.load import load

        sae = load(Path(path))
        return self.architecture.read(sae.config, sae.tensors())

    @torch.no_grad()
    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        """One optimizer step. Raises StageFailed at a loss that is not finite; the state before that step is what `state` gave last."""
        job = self.job
        if job.target_site is not None and y_BD is None:
            raise StageFailed(f"{job.id} is a transcoder to {job.target_site}, but got no targets", where=f"train {job.id}, step {self.steps_done}")
        x_BD = self._rows(x_BD, job.d_in, "rows")
        y_BD = x_BD if job.target_site is None else self._rows(y_BD, job.d_out, "targets")
        lr = self.config.peak_lr(job) * lr_factor(self.steps_done, job.steps, self.config.warmup, self.config.last_decay)
        if self.replay is not None:
            last, residual_BD = self.replay(x_BD, y_BD, lr)
        else:
            last, residual_BD = self._work(x_BD, y_BD, lr)
        self._last = {**last, "lr": lr}
        if self.replay is not None and self.steps_done % CHECK_EVERY == 0:
            self._check_finite()
        self.steps_done += 1
        if self.steps_done in self.config.resampling_steps(job):
            self._resample(x_BD, y_BD, residual_BD)

    def _work(self, x_BD: Tensor, y_BD: Tensor, lr: float | Tensor) -> tuple[dict[str, Tensor | float], Tensor]:
        """The part of a step between rows and changed tensors; its metrics and the residual. With `lr` a tensor (`replay.Work`'s numbers), it
        reads nothing back from the device."""
        dead_F = self.since_fired_F >= self.dead_rows
        result = self.architecture.gradients(self.params, x_BD, y_BD, dead_F, self.steps_done)
        last = {
            "loss": result.loss,
            "squared_error": result.squared_error,
            "variance": torch.sub(y_BD, y_BD.mean(0), out=self.kernels.room("variance", y_BD.shape)).square_().sum(),
            "l0": result.l0,
            "dead": dead_F.float().mean(),
            **result.extra,
        }
        waits = not isinstance(lr, Tensor)
        if waits and (x_BD.device.type == "cpu" or self.steps_done % CHECK_EVERY == 0):
            self._last = {**last, "lr": lr}
            self._check_finite()
        self.architecture.before_update(self.params, result.grads)
        for name in self.config.frozen:  # after what is projected in place, before the norm of what remains
            result.grads.pop(name)
        if self.config.clip is not None:
            clip(self.params, result.grads, self.config.clip)
        if self.config.equalize:
            fvu = result.squared_error / (x_BD.shape[0] * self.architecture.constants["variance"])
            scale(result.grads, fvu.clamp_min(1e-6).pow(-self.config.equalize))
        if waits:
            self.optimizer.step(result.grads, lr)
        else:
            self.optimizer.apply(result.grads, *lr)
        if not isinstance(result.grads.get("W_dec"), RowSums):  # which the optimizer keeps on its constraint
            self.architecture.after_update(self.params)
        self.since_fired_F += x_BD.shape[0]
        self.since_fired_F.masked_fill_(result.fired_F, 0)
        return last, result.residual_BD

    def _resample(self, x_BD: Tensor, y_BD: Tensor, residual_BD: Tensor) -> None:
        """Dead latents become directions of rows of this batch, drawn with probability ∝ |e|⁴ (Bricken et al. 2023), and start afresh."""
        dead_N = (self.since_fired_F >= self.dead_rows).nonzero().squeeze(1)
        if not dead_N.numel():
            return
        chances_B = residual_BD.double().square().sum(1).square().cpu()
        draw = generator(self.job.id, self.job.seed, "resample", self.steps_done)
        picks_N = torch.multinomial(chances_B.clamp_min(1e-30), dead_N.numel(), replacement=True, generator=draw).to(dead_N.device)
        for name in self.architecture.resample(self.params, dead_N, x_BD[picks_N], y_BD[picks_N], x_BD):
            self.optimizer.restart(name, dead_N)
        self.since_fired_F[dead_N] = 0

    def _check_finite(self) -> None:
        loss = float(self._last["loss"])
        if not math.isfinite(loss):
            raise StageFailed(
                f"the loss of {self.job.id} is {loss} at step {self.steps_done + 1} of {self.job.steps}",
                where=f"train {self.job.id}",
                why="the learning rate is too high, or the rows hold extreme values",
                fix=f"set lr below {self.config.peak_lr(self.job):.1e} in the recipe's `with:` and run again; what was saved before stays valid",
            )

    def cautions(self) -> list[str]:
        """What to know about how this SAE was computed."""
        return self.kernels.cautions()

    def metrics(self) -> dict[str, float]:
        """Of the last step: `loss`, `fvu` (Σ|e|² over the variance of the same batch), `l0`, `dead` (share), `lr`. Waits for the device."""
        if not self._last:
            return {}
        last = {name: float(value) for name, value in self._last.items()}
        squared_error, variance = last.pop("squared_error"), last.pop("variance")
        return {"loss": last["loss"], "fvu": squared_error / variance if variance > 0 else math.nan, **last}

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Parameters, Adam's moments, rows since each latent fired; and the step count. Refuses to save a state that is not finite."""
        tensors = self._refuse_broken()
        data = {
            "version": 1,
            "steps_done": self.steps_done,
            "kernels": self.kernels.name,
            "kernel_state": self.kernels.state(),
            "constants": dict(self.architecture.constants),
            "optimizer": self.optimizer.scalars(),
            "last": {name: float(value) for name, value in self._last.items()},
        }
        return {name: t.detach().cpu().clone() for name, t in tensors.items()}, data

    def _refuse_broken(self) -> dict[str, Tensor]:
        """The tensors of the state, all of them finite."""
        if self._last:
            self._check_finite()
        tensors = {f"param.{name}": p for name, p in self.params.items()}
        tensors |= {f"{self.config.optimizer}.{name}": moment for name, moment in self.optimizer.state().items()}
        tensors["since_fired"] = self.since_fired_F
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            raise StageFailed(
                f"{broken[0]} of {self.job.id} is not finite after step {self.steps_done}",
                where=f"train {self.job.id}",
                fix=f"set lr below {self.config.peak_lr(self.job):.1e} in the recipe's `with:` and run again; what was saved before stays valid",
            )
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Go on exactly where `state` was taken. Raises FormatError if the state is of another job or version."""
        held = {f"param.{name}": p for name, p in self.params.items()}
        held |= {f"{self.config.optimizer}.{name}": moment for name, moment in self.optimizer.state().items()}
        held["since_fired"] = self.since_fired_F
        if data.get("version") != 1:
            raise FormatError(f"the state of {self.job.id} has version {data.get('version')}; this saehub reads 1", where=f"train {self.job.id}")
        wrong = [name for name, t in held.items() if name not in tensors or tensors[name].shape != t.shape or tensors[name].dtype != t.dtype]
        if wrong:
            raise FormatError(
                f"the state of {self.job.id} does not fit its settings: {', '.join(sorted(wrong))}", where=f"train {self.job.id}"
            )
        self.kernels = self.architecture.kernels = pick(self.job.device, data["kernels"])
        self.kernels.load_state(data.get("kernel_state", {}))
        self.kernels.lazy = self._takes_row_sums()
        self.replay = self._replay()
        for name, tensor in held.items():
            tensor.copy_(tensors[name])
        self.architecture.constants = dict(data["constants"])
        self.steps_done = int(data["steps_done"])
        self.optimizer.load_state(self.optimizer.state(), data["optimizer"], self.steps_done)
        self._last = dict(data["last"])

    @torch.no_grad()
    def finish(self) -> SAE:
        """The SAE in the units of the rows that it was given, float32, on the CPU; thresholds are calibrated on calibration rows."""
        from saehub.checkpoint.sae import SAE, SAEConfig

        self._refuse_broken()
        fields, tensors = self.architecture.export(self.params | self.optimizer.result(), self._calibration_rows()[0])
        return SAE.build(SAEConfig(**fields), {name: t.cpu() for name, t in tensors.items()})
