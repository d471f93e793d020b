"""The `with:` of a recipe in; checked settings of the trainer out. No torch here: a plan reads these without loading anything heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saehub_example import ARCHITECTURE

if TYPE_CHECKING:
    from saehub.api import Job


@dataclass(frozen=True)
class PeakConfig:
    """Settings of `example/peak`."""

    tau: float = 0.4
    """Share of the row's largest pre-activation that a latent must reach: 1 keeps one latent, 0 is a ReLU."""
    expansion: float = 4.0
    """Latents per input dimension."""
    batch: int = 256
    """Rows a step."""
    lr: float = 1e-2
    """Learning rate of Adam."""

    def architecture(self) -> str:
        """The word in saehub.json."""
        return ARCHITECTURE

    def d_sae(self, job: Job) -> int:
        """Number of latents."""
        return max(1, round(self.expansion * job.d_in))

    def memory(self, job: Job) -> int:
        """Bytes: parameters, gradients and two moments; dense pre-activations and features of a batch with their gradients."""
        latents = self.d_sae(job)
        return 16 * latents * (job.d_in + job.d_out + 1) + 16 * self.batch * latents

    def check(self, job: Job) -> Iterator[str]:
        """Problems with a job, each beginning with the setting that it is about."""
        if not 0 <= self.tau < 1:
            yield f"tau is {self.tau:g}; it is a share, from 0 to below 1"
        if not self.expansion > 0:
            yield f"expansion is {self.expansion:g}; it must be above 0"
        if self.batch < 1:
            yield f"batch is {self.batch}; it must be at least 1"
        if not self.lr > 0:
            yield f"lr is {self.lr:g}; it must be above 0"
        if job.target_site is not None or job.d_in != job.d_out:
            yield "example/peak trains autoencoders only; leave target_site out"
        if job.init_from is not None:
            yield "example/peak starts from random directions only; leave init_from out"
