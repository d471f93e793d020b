"""Parameters and gradients in, updated parameters out: Adam (Kingma & Ba, 2015) with plain tensors as its whole state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from saehub_native.kernels.lazy import RowSums


class Optimizer(Protocol):
    """What the training loop asks of an optimizer; parameters are updated in place."""

    t: int
    """Steps taken."""

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """One update."""
        ...

    def result(self) -> dict[str, Tensor]:
        """The parameters to evaluate, where they are not those being updated."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Its own tensors, by name."""
        ...

    def scalars(self) -> dict[str, Any]:
        """Its own numbers, for JSON."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], t: int) -> None:
        """Take over what `state` and `scalars` returned, after `t` steps."""
        ...

    def restart(self, name: str, rows_N: Tensor) -> None:
        """Forget the past of some rows of a parameter, which have just been replaced."""
        ...


class Adam:
    """m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − lr · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε), in place.

    Own code rather than `torch.optim`, because its state must be a flat table of tensors and its arithmetic the same in every torch version.
    """

    def __init__(self, params: Mapping[str, Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.params, self.betas, self.eps = dict(params), betas, eps
        self.t = 0
        self.now: float | Tensor = 0  # t, where kernels find it
        self.m = {name: torch.zeros_like(p) for name, p in params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in params.items()}
        self._scratch: dict[str, Tensor] = {}

    def step(self, grads: Mapping[str, Tensor | RowSums], lr: float) -> None:
        """One update of every parameter that has a gradient of its name; `RowSums` are formed, projected, used and forgotten row by row."""
        self.apply(grads, *self.scales(lr))

    def scales(self, lr: float) -> tuple[float, float, float]:
        """Begin a step: lr/(1−β₁ᵗ), √(1−β₂ᵗ) and t."""
        self.t += 1
        beta1, beta2 = self.betas
        return lr / (1 - beta1**self.t), math.sqrt(1 - beta2**self.t), self.t

    def apply(self, grads: Mapping[str, Tensor | RowSums], size: float | Tensor, spread: float | Tensor, t: float | Tensor) -> None:
        """The update itself; 0-dimensional tensors in place of numbers let a device repeat it without being told new ones."""
        self.now = t
        for name, g in grads.items():
            if isinstance(g, RowSums):
                g.kernels.update(self, name, g, size, spread)
            else:
                self.apply_dense(name, g, size, spread)

    def apply_dense(self, name: str, g: Tensor, size: float | Tensor, spread: float | Tensor) -> None:
        """One parameter, from a gradient that is held whole."""
        beta1, beta2 = self.betas
        if name not in self._scratch:
            self._scratch[name] = torch.empty_like(self.params[name])
        self.m[name].lerp_(g, 1 - beta1)
        v = self.v[name].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = torch.sqrt(v, out=self._scratch[name]).div_(spread).add_(self.eps)
        if isinstance(size, Tensor):
            self.params[name].sub_(torch.div(self.m[name], scale, out=scale).mul_(size))
        else:
            self.params[name].addcdiv_(self.m[name], scale, value=-size)

    def state(self) -> dict[str, Tensor]:
        """`m.<name>` and `v.<name>`; the step count is the session's."""
        return {f"{kind}.{name}": moment for kind in ("m", "v") for name, moment in getattr(self, kind).items()}

    def result(self) -> dict[str, Tensor]:
        """The parameters to evaluate."""
        return self.params

    def scalars(self) -> dict[str, Any]:
        """None."""
        return {}

    def restart(self, name: str, rows_N: Tensor) -> None:
        """Forget the past of some rows of a parameter, which have just been replaced."""
        self.m[name][rows_N] = 0
        self.v[name][rows_N] = 0

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], t: int) -> None:
        """Take over what `state` returned, after `t` steps."""
        self.t = t
        for kind in ("m", "v"):
            for name, moment in getattr(self, kind).items():
                moment.copy_(tensors[f"{kind}.{name}"])


def scale(grads: Mapping[str, Tensor | RowSums], factor: Tensor) -> None:
    """Multiply all gradients, in place."""
    for g in grads.values():
        if isinstance(g, RowSums):
            g.factor = g.factor * (factor if g.kernels.name == "gpu" else float(factor))
        else:
            g.mul_(factor)


def clip(params: Mapping[str, Tensor], grads: Mapping[str, Tensor | RowSums], largest: float) -> None:
    """Scale all gradients, in place, so that their common L2 norm is at most `largest`.

    The norm of `RowSums` costs another pass over the pairs. It is spared where an upper bound of the norm is already small enough: then the
    factor is 1 whatever the norm is.
    """
    plain = [g for g in grads.values() if not isinstance(g, RowSums)]
    lazy = {name: g for name, g in grads.items() if isinstance(g, RowSums)}
    if lazy and next(iter(lazy.values())).kernels.name == "gpu":  # the host does not wait for a norm
        factor = next(iter(lazy.values())).kernels.clip_factor(params, plain, lazy, largest)
        for g in plain:
            g.mul_(factor)
        for g in lazy.values():
            g.factor = factor
        return
    norms = [g.norm() for g in plain]
    if lazy:
        square = float(torch.stack(norms).double().square().sum()) if norms else 0.0
        if square + sum(g.kernels.square_bound(g) for g in lazy.values()) <= largest**2:
            return
        norms += [plain[0].new_tensor(math.sqrt(g.kernels.square(g, params[name]))) for name, g in lazy.items()]
    factor = (largest / torch.stack(norms).norm().clamp_min(1e-30)).clamp_max(1.0)
    for g in plain:
        g.mul_(factor)
    for g in lazy.values():
        g.factor *= float(factor)
