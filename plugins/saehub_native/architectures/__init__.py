"""The interface between the training loop and one architecture: rows and parameters in, loss and gradients out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saehub.api import Job
    from saehub_native.kernels import Kernels


@dataclass
class StepResult:
    """What one batch says; all scalars stay 0-dimensional tensors, so that nothing waits for the device."""

    grads: dict[str, Tensor]
    """One gradient a parameter."""
    loss: Tensor
    """What the gradients belong to."""
    squared_error: Tensor
    """Σ|x̂ − y|² over the batch."""
    l0: Tensor
    """Mean number of latents above zero in a row."""
    fired_F: Tensor
    """bool [F]: above zero in at least one row."""
    residual_BD: Tensor
    """y − x̂."""
    extra: dict[str, Tensor | float] = field(default_factory=dict)
    """Further metrics, such as the k of this step."""


class Architecture(Protocol):
    """One way to encode, with its loss. A config names its class in `objective`, so a plugin's architecture trains in the same loop:
    register a component whose target is `saehub_native.train:NativeTrainer` and whose config is a `TrainConfig` of the plugin's own.
    """

    kernels: Kernels
    constants: dict[str, float]
    """Numbers fixed by `init` that training needs; saved and restored with the state."""

    def __init__(self, config: Any, job: Job, kernels: Kernels): ...

    def init(self, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters from calibration rows; sets `constants`."""
        ...

    def gradients(self, params: Mapping[str, Tensor], x_BD: Tensor, y_BD: Tensor, dead_F: Tensor, step: int | None = None) -> StepResult:
        """Loss and gradients on one batch; changes neither the rows nor the parameters. `dead_F` is bool [F]; `step` counts from 0, and
        schedules (k, penalties) stand where they end without it."""
        ...

    def before_update(self, params: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        """Project gradients, in place."""
        ...

    def after_update(self, params: Mapping[str, Tensor]) -> None:
        """Put parameters back on their constraint, in place."""
        ...

    def resample(self, params: Mapping[str, Tensor], dead_N: Tensor, x_ND: Tensor, y_ND: Tensor, x_BD: Tensor) -> list[str]:
        """Replace the latents `dead_N`, in place, by directions of the rows x_ND with targets y_ND out of the batch x_BD; the parameters changed."""
        ...

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields of `saehub.checkpoint.sae.SAEConfig`, and the tensors of checkpoint format v1; x_ND: calibration rows, for a threshold that
        inference needs and training does not."""
        ...

    def read(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `export`: parameters out of a checkpoint (warm start)."""
        ...
