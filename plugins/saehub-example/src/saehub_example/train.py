"""Batches of rows in; a trained Peak SAE out: dense autograd and Adam, stoppable and restorable between any two steps."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub import SAE, SAEConfig, UsageError
from saehub.api import Calibration, Job
from saehub.seeds import generator
from saehub_example import ARCHITECTURE
from saehub_example.train_config import PeakConfig

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class PeakTrainer:
    """Implements `saehub.api.Trainer`."""

    def __init__(self, config: PeakConfig):
        self.config = config

    def open(self, job: Job, calibration: Calibration) -> PeakSession:
        """One SAE; b_dec starts at the calibration mean, directions are random. UsageError for jobs that it cannot do."""
        problems = list(self.config.check(job))
        if problems:
            raise UsageError(f"{job.id} cannot be trained: {'; '.join(problems)}", where=f"train {job.id}", fix="saehub recipe check")
        return PeakSession(self.config, job, calibration)


class PeakSession:
    """Implements `saehub.api.TrainerSession`. All randomness comes from the job's id and seed, so jobs side by side end as alone.

        loss = mean over rows of ‖x̂ - x‖² / ‖x - mean‖²        decoder rows have length 1 after every step
    """

    def __init__(self, config: PeakConfig, job: Job, calibration: Calibration):
        self.config, self.job, self.steps = config, job, 0
        self.last: dict[str, float] = {}
        x_ND, _ = calibration(min(1024, job.calibration or 1024))
        self.variance = float((x_ND - x_ND.mean(0)).square().sum(1).mean().clamp_min(1e-12))
        random = torch.randn(config.d_sae(job), job.d_in, generator=generator("peak", job.id, job.seed))
        W_dec_FD = torch.nn.functional.normalize(random, dim=1)
        start = {"W_enc": W_dec_FD.T.clone(), "b_enc": torch.zeros(len(W_dec_FD)), "W_dec": W_dec_FD, "b_dec": x_ND.mean(0).cpu()}
        self.parameters = [start[name].to(job.device, torch.float32).requires_grad_() for name in NAMES]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr)

    def _sae(self, tensors: list[Tensor]) -> SAE:
        config = SAEConfig(ARCHITECTURE, self.job.d_in, self.config.d_sae(self.job), params={"tau": self.config.tau})
        return SAE.build(config, dict(zip(NAMES, tensors, strict=True)))

    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        """One step of Adam; the learning rate falls linearly over the last fifth."""
        with torch.enable_grad():  # the hub may hold gradients off
            W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = self.parameters
            p_BF = (x_BD - b_dec_D) @ W_enc_DF + b_enc_F
            kept_BF = p_BF >= self.config.tau * p_BF.detach().amax(1, keepdim=True).relu()
            f_BF = p_BF.relu() * kept_BF
            error = (f_BF @ W_dec_FD + b_dec_D - x_BD).square().sum(1).mean()
            loss = error / self.variance
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.param_groups[0]["lr"] = self.config.lr * min(1.0, 5 * (1 - self.steps / self.job.steps))
        self.optimizer.step()
        with torch.no_grad():
            W_dec_FD.div_(W_dec_FD.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.steps += 1
        fvu = error.detach() / (x_BD - x_BD.mean(0)).square().sum(1).mean().clamp_min(1e-12)
        self.last = {"loss": float(loss.detach()), "fvu": float(fvu), "l0": float((f_BF.detach() > 0).sum(1).float().mean())}

    def metrics(self) -> dict[str, float]:
        """Of the last step."""
        return dict(self.last)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Parameters, Adam's moments, and counters."""
        tensors = {}
        for name, parameter in zip(NAMES, self.parameters, strict=True):
            tensors[name] = parameter.detach().clone()
            tensors |= {f"{key}.{name}": value.detach().clone() for key, value in self.optimizer.state.get(parameter, {}).items()}
        return tensors, {"steps": self.steps, "last": self.last}

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Go on from what `state` gave."""
        for name, parameter in zip(NAMES, self.parameters, strict=True):
            parameter.data.copy_(tensors[name])
            ending = f".{name}"
            self.optimizer.state[parameter] = {key.removesuffix(ending): t.clone() for key, t in tensors.items() if key.endswith(ending)}
        self.steps, self.last = data["steps"], dict(data["last"])

    def finish(self) -> SAE:
        """The SAE in the units of the rows it was given; the hub folds its own normalisation."""
        return self._sae([parameter.detach().cpu().clone() for parameter in self.parameters])
