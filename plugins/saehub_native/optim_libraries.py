"""Parameters and gradients in, updated parameters out: Muon of torch and schedule-free Adam of `schedulefree`, with their state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.errors import MissingDependency, UsageError
from saehub_native.optim import Adam

if TYPE_CHECKING:
    from saehub_native.config import TrainConfig
    from saehub_native.optim import Optimizer


def make(config: TrainConfig, params: Mapping[str, Tensor]) -> Optimizer:
    """The optimizer that `config.optimizer` names."""
    if config.optimizer == "muon":
        return Muon(params, config.betas)
    if config.optimizer == "schedule_free":
        return ScheduleFree(params, config.betas)
    if config.adam_bits == 8:
        from saehub_native.optim8 import Adam8

        return Adam8(params, config.betas)
    return Adam(params, config.betas)


class Muon:
    """Matrices by `torch.optim.Muon` (Jordan et al. 2024: momentum, orthogonalised by five Newton–Schulz steps), everything else by Adam.

    Updates are scaled to the root mean square that Adam's have (`match_rms_adamw`, Liu et al. 2025, arXiv 2502.16982), so that one learning
    rate fits both. No weight decay.
    """

    def __init__(self, params: Mapping[str, Tensor], betas: tuple[float, float]):
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(f"torch {torch.__version__} has no Muon", fix="pip install 'torch>=2.9', or optimizer: adam")
        self.matrices = {name: p for name, p in params.items() if p.ndim == 2}
        self.adam = Adam({name: p for name, p in params.items() if p.ndim != 2}, betas)
        self.muon = torch.optim.Muon(list(self.matrices.values()), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @property
    def t(self) -> int:
        """Steps taken."""
        return self.adam.t

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """One update of every parameter."""
        self.adam.step({name: g for name, g in grads.items() if name not in self.matrices}, lr)
        _library_step(self.muon, self.matrices, grads, lr)

    def result(self) -> dict[str, Tensor]:
        """The parameters to evaluate."""
        return {**self.matrices, **self.adam.params}

    def state(self) -> dict[str, Tensor]:
        """Adam's moments, and `momentum.<name>` of each matrix."""
        return self.adam.state() | {f"momentum.{name}": self._momentum(name) for name in self.matrices}

    def scalars(self) -> dict[str, Any]:
        """None."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], t: int) -> None:
        """Take over what `state` and `scalars` returned, after `t` steps."""
        self.adam.load_state(tensors, scalars, t)
        for name in self.matrices:
            self._momentum(name).copy_(tensors[f"momentum.{name}"])

    def restart(self, name: str, rows_N: Tensor) -> None:
        """Forget the past of some rows of a parameter, which have just been replaced."""
        if name in self.matrices:
            self._momentum(name)[rows_N] = 0
        else:
            self.adam.restart(name, rows_N)

    def _momentum(self, name: str) -> Tensor:
        p = self.matrices[name]
        state = self.muon.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)  # what its first step makes
        return state["momentum_buffer"]


class ScheduleFree:
    """`schedulefree.AdamWScheduleFree` (Defazio et al. 2024, arXiv 2405.15682): gradients are taken at y = (1 − β₁) z + β₁ x, z takes Adam's steps
    without a first moment, and x, the average of the z, is the result. The learning rate warms up and never decays.
    """

    def __init__(self, params: Mapping[str, Tensor], betas: tuple[float, float]):
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise MissingDependency("optimizer: schedule_free needs schedulefree", fix="pip install 'saehub[schedule-free]'") from error
        self.params, self.beta1 = dict(params), betas[0]
        self.library = AdamWScheduleFree(list(self.params.values()), betas=betas, weight_decay=0.0, foreach=False)
        self.library.train()
        for p in self.params.values():
            self.library.state[p] |= {"z": p.clone(), "exp_avg_sq": torch.zeros_like(p)}  # what its first step makes

    @property
    def t(self) -> int:
        """Steps taken."""
        return self.library.param_groups[0]["k"]

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """One update of every parameter."""
        _library_step(self.library, self.params, grads, lr)

    def result(self) -> dict[str, Tensor]:
        """x, from y and z."""
        return {name: torch.lerp(p, self.library.state[p]["z"], 1 - 1 / self.beta1) for name, p in self.params.items()}

    def state(self) -> dict[str, Tensor]:
        """`z.<name>` and `exp_avg_sq.<name>`."""
        return {f"{kind}.{name}": self.library.state[p][kind] for kind in ("z", "exp_avg_sq") for name, p in self.params.items()}

    SCALARS = ("k", "weight_sum", "lr_max", "scheduled_lr")

    def scalars(self) -> dict[str, Any]:
        """The running weights of the average."""
        return {name: self.library.param_groups[0][name] for name in self.SCALARS}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], t: int) -> None:
        """Take over what `state` and `scalars` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.library.param_groups[0].update({name: scalars[name] for name in self.SCALARS})

    def restart(self, name: str, rows_N: Tensor) -> None:
        """Forget the past of some rows of a parameter, which have just been replaced."""
        state = self.library.state[self.params[name]]
        state["z"][rows_N] = self.params[name][rows_N]
        state["exp_avg_sq"][rows_N] = 0


def _library_step(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], lr: float) -> None:
    """One step of a torch optimizer with gradients handed to it, which may be used up."""
    for name, p in params.items():
        p.grad = grads.get(name)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for p in params.values():
        p.grad = None
