"""The hub's batches in, a saehub SAE out: SAELens' own training classes and its SAETrainer, unmodified, one step at a time."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.errors import FormatError, StageFailed, UsageError
from saehub.seeds import derive
from saehub_saelens import training
from saehub_saelens.mapping import Foreign, from_saelens
from saehub_saelens.train_config import ESTIMATED_NORMS, SAELensConfig

if TYPE_CHECKING:
    from saehub.api import Calibration, Job
    from saehub.checkpoint.sae import SAE

STATE_VERSION = 1
COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")
CHUNK = 1 << 24
"""Pre-activations that exist at a time while a threshold is calibrated."""


def init_seed(job: Job) -> int:
    """The seed under which SAELens draws the first weights: a function of the job alone."""
    return derive(job.id, job.seed, "saelens")


class SAELensTrainer:
    """Implements `saehub.api.Trainer` for every config of `train_config`."""

    def __init__(self, config: SAELensConfig):
        self.config = config

    def open(self, job: Job, calibration: Calibration) -> SAELensSession:
        """One SAE, initialised by SAELens. UsageError for settings that do not fit the job."""
        problems = list(self.config.check(job))
        if problems:
            raise UsageError(f"{job.id} cannot be trained: " + "; ".join(problems), where=f"train {job.id}", fix="saehub recipe check")
        return SAELensSession(self.config, job, calibration)


@contextmanager
def own_random_state(job: Job) -> Iterator[None]:
    """SAELens reads torch's global generators and takes no seed: they are seeded for it and put back."""
    device = torch.device(job.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(init_seed(job))
        yield


class SAELensSession:
    """Implements `saehub.api.TrainerSession` around one `SAETrainer`: what its `fit` does between two batches, without its loop.

    The whole state is the parameters, Adam's moments, the two schedules and SAELens' counters; nothing in a step is random. So a run
    that was stopped ends bit-identical to one that was not.
    """

    def __init__(self, config: SAELensConfig, job: Job, calibration: Calibration):
        from saehub_saelens import library

        self.config, self.job = config, job
        sae_class, config_class, trainer_class, trainer_config_class = library.training_classes(config.word, config.sae_settings(job))
        with warnings.catch_warnings(), own_random_state(job):
            warnings.simplefilter("ignore")  # about models and hooks that are not used here
            self.sae = sae_class(config_class(**config.sae_settings(job)))
            if job.init_from is not None:
                self._warm_start(job.init_from)
            self.trainer = trainer_class(trainer_config_class(**config.trainer_settings(job)), self.sae, iter(()))
        self.calibration_ND: Tensor | None = None
        if getattr(config, "threshold", None) == "calibrated" or config.normalize_activations in ESTIMATED_NORMS:
            rows = min(config.calibration, job.calibration or config.calibration)
            self.calibration_ND = self._rows(calibration(rows)[0], "calibration rows")
        self._estimate_norm()
        self._last: Any = None
        self._metrics: dict[str, float] = {}

    def _rows(self, x_ND: Tensor, what: str) -> Tensor:
        if x_ND.ndim != 2 or x_ND.shape[1] != self.job.d_in:
            where = f"train {self.job.id}"
            raise StageFailed(f"{what} have shape {list(x_ND.shape)}", where=where, why=f"[rows, {self.job.d_in}] was expected at {self.job.site}")
        return x_ND.detach().to(self.job.device, torch.float32)

    @torch.no_grad()
    def _estimate_norm(self) -> None:
        """`ActivationScaler`'s own estimates, which `fit` would draw from the training data, from calibration rows."""
        norm = self.config.normalize_activations
        if norm not in ESTIMATED_NORMS:
            return
        batches = self.calibration_ND.split(self.job.batch)
        estimate = "estimate_scaling_factor" if norm == "expected_average_only_in" else "estimate_whitening"
        getattr(self.trainer.activation_scaler, estimate)(
            d_in=self.job.d_in, data_provider=iter(batches), n_batches_for_norm_estimate=len(batches)
        )

    def _warm_start(self, path: str) -> None:
        """Parameters of a saehub SAE of this very kind."""
        from saehub.checkpoint.load import load

        sae = load(Path(path))
        mine, theirs = self._read(training.Scaler()).config, sae.config
        wrong = [
            f"{name} {getattr(theirs, name)!r} for {getattr(mine, name)!r}"
            for name in ("architecture", "kind", "d_in", "d_sae", "norm_in", "subtract_b_dec", "decoder_norm_scaling")
            if getattr(theirs, name) != getattr(mine, name)
        ]
        if wrong:
            raise UsageError(f"init_from {path} is another kind of SAE: {', '.join(wrong)}", where=f"train {self.job.id}", fix="settings that match it")
        stored = sae.tensors()
        names = {"topk_threshold": "threshold"}
        with torch.no_grad():
            for name, tensor in self.sae.state_dict().items():
                tensor.copy_(stored[names.get(name, name)])

    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        """One optimizer step, as `SAETrainer.fit` takes it."""
        trainer = self.trainer
        x_BD = self._rows(x_BD, "rows").clone()  # SAELens' output keeps its input
        self._last = None  # frees the features of the step before
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.maybe_reset_sparsity()
            self._last = trainer.step(x_BD)
        trainer.n_training_steps += 1
        # On the CPU a look at the loss costs nothing; on a device it would wait for it, so `metrics` and `state` look.
        if x_BD.device.type == "cpu":
            self._check_finite()

    def _check_finite(self) -> None:
        if self._last is not None and not math.isfinite(float(self._last.loss.detach())):
            raise StageFailed(
                f"the loss of {self.job.id} is {float(self._last.loss.detach())} at step {self.trainer.n_training_steps} of {self.job.steps}",
                where=f"train {self.job.id}",
                why="learning rate too high, or rows that are not finite",
                fix=f"set lr below {self.config.lr:.1e} in the recipe's `with:` and run again; what was saved before stays valid",
            )

    def metrics(self) -> dict[str, float]:
        """SAELens' own log of the last step: `loss` and its parts, `fvu`, `l0`, `dead` (share), `lr`."""
        if self._last is None:
            return dict(self._metrics)
        self._check_finite()
        log = self.trainer.build_train_step_log_dict(self._last, self.trainer.n_training_samples)
        found = {
            "loss": log["losses/overall_loss"],
            "fvu": 1 - log["metrics/explained_variance"],
            "l0": log["metrics/l0"],
            "dead": log["sparsity/dead_features"] / self.sae.cfg.d_sae,
            "lr": log["details/current_learning_rate"],
        }
        found |= {name.partition("/")[2]: value for name, value in log.items() if name.startswith("losses/") and name != "losses/overall_loss"}
        self._metrics = {name: float(value) for name, value in found.items() if math.isfinite(float(value))}
        return dict(self._metrics)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Parameters, Adam's moments, SAELens' firing statistics and whitening; schedules and counters. Refuses a state that is not finite."""
        self.metrics()
        trainer = self.trainer
        tensors = {f"sae.{name}": t for name, t in self.sae.state_dict().items()}
        for number, moments in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": t for name, t in moments.items()}
        tensors |= {f"statistics.{name}": getattr(trainer, name) for name in STATISTICS}
        scaler = trainer.activation_scaler
        if scaler.whitening is not None:
            tensors |= {f"whitening.{name}": getattr(scaler.whitening, name) for name in ("mean", "matrix", "inverse_matrix")}
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            raise StageFailed(
                f"{broken[0]} of {self.job.id} is not finite after step {trainer.n_training_steps}",
                where=f"train {self.job.id}",
                fix=f"set lr below {self.config.lr:.1e} in the recipe's `with:` and run again; what was saved before stays valid",
            )
        data = {
            "version": STATE_VERSION,
            "counters": {name: getattr(trainer, name) for name in COUNTERS},
            "groups": [{name: value for name, value in group.items() if name != "params"} for group in trainer.optimizer.param_groups],
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficients": {name: dict(scheduler.state_dict()) for name, scheduler in trainer.coefficient_schedulers.items()},
            "scaling_factor": scaler.scaling_factor,
            "metrics": dict(self._metrics),
        }
        return {name: t.detach().cpu().clone() for name, t in tensors.items()}, copy.deepcopy(data)

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Go on exactly where `state` was taken. FormatError if the state is of another job or version."""
        trainer, where = self.trainer, f"train {self.job.id}"
        if data.get("version") != STATE_VERSION:
            raise FormatError(f"the state of {self.job.id} has version {data.get('version')}; this adapter reads {STATE_VERSION}", where=where)
        held = {f"sae.{name}": t for name, t in self.sae.state_dict().items()} | {f"statistics.{name}": getattr(trainer, name) for name in STATISTICS}
        wrong = sorted(name for name, t in held.items() if name not in tensors or tensors[name].shape != t.shape or tensors[name].dtype != t.dtype)
        if wrong:
            raise FormatError(f"the state of {self.job.id} does not fit its settings: {', '.join(wrong)}", where=where)
        data = copy.deepcopy(data)
        for name, tensor in held.items():
            tensor.copy_(tensors[name])
        adam: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adam":
                number, _, moment = rest.partition(".")
                adam.setdefault(int(number), {})[moment] = tensor.clone()
        groups = [{**group, "betas": tuple(group["betas"]), "params": old["params"]} for group, old in
                  zip(data["groups"], trainer.optimizer.state_dict()["param_groups"], strict=True)]  # fmt: skip
        trainer.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        trainer.lr_scheduler.load_state_dict(data["lr_scheduler"])
        for name, scheduler in trainer.coefficient_schedulers.items():
            scheduler.load_state_dict(data["coefficients"][name])
        for name in COUNTERS:
            setattr(trainer, name, data["counters"][name])
        scaler = trainer.activation_scaler
        scaler.scaling_factor = data["scaling_factor"]
        if scaler.whitening is not None:
            for name in ("mean", "matrix", "inverse_matrix"):
                getattr(scaler.whitening, name).copy_(tensors[f"whitening.{name}"])
        self._last, self._metrics = None, dict(data["metrics"])

    @torch.no_grad()
    def finish(self) -> SAE:
        """The SAE in the units of the rows that it was given, float32, on the CPU: what `save_inference_model` would keep, decoder norms unfolded.

        The threshold of batchtopk and matryoshka is set on calibration rows, see `calibrated`; SAELens' own stands in `provenance.origin`.
        """
        self.state()  # refuses NaN
        self.trainer.set_final_sae_metadata()
        scaler = self.trainer.activation_scaler
        whitening = scaler.whitening
        parts = None if whitening is None else {"mean": whitening.mean, "matrix": whitening.matrix, "inverse_matrix": whitening.inverse_matrix}
        sae = self._read(training.Scaler(scaler.scaling_factor, None if parts is None else {name: t.cpu() for name, t in parts.items()}))
        if getattr(self.config, "threshold", None) == "calibrated":
            sae = calibrated(sae, self.calibration_ND.cpu(), self.config.k)
        return sae

    def _read(self, scaler: training.Scaler) -> SAE:
        """This adapter's reading of a SAELens training checkpoint, of what stands in memory."""
        config = {**self.sae.cfg.to_dict(), "device": "cpu"}
        tensors = {name: t.detach().cpu().clone() for name, t in self.sae.state_dict().items()}
        sae = from_saelens(Foreign(copy.deepcopy(config), tensors, scaler))
        made = {name: t.float() if t.is_floating_point() else t for name, t in sae.tensors().items()}
        return type(sae)(sae.config, made, sae.provenance)


def calibrated(sae: SAE, x_ND: Tensor, k: float) -> SAE:
    """The same SAE with the threshold under which k latents a row are active on the rows x_ND [n, d_in], on average.

        θ = the mean of the k·n-th and the next largest of all max(p_ij, 0)     (0 where fewer are positive)

    The k·n largest are kept while rows pass in chunks, so memory does not grow with n · d_sae.
    """
    wanted = int(k * x_ND.shape[0]) + 1
    largest = torch.empty(0)
    for x_BD in x_ND.split(max(1, CHUNK // sae.config.d_sae)):
        p = sae.preacts(sae.centre(x_BD)).flatten()
        largest = torch.cat([largest, p[p > 0]])
        if largest.numel() > wanted:
            largest = largest.topk(wanted, sorted=False).values
    edge = largest.sort().values[:2]
    theta = edge.mean() if largest.numel() == wanted and wanted > 1 else torch.zeros(())
    origin = dict(sae.provenance.get("origin") or {}, running_threshold=float(sae.tensors()["threshold"]), calibration_rows=x_ND.shape[0])
    return type(sae)(sae.config, {**sae.tensors(), "threshold": theta.reshape(()).clone()}, {**sae.provenance, "origin": origin})
