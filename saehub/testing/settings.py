"""The toys' settings: a recipe's `with:` in, frozen dataclasses out; imports no torch, as a plugin's config module must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saehub.api import Job


@dataclass(frozen=True)
class ToyTrain:
    """Settings of `ToyTrainer`."""

    k: int = 4
    """Latents a row."""
    latents: int = 96
    """Width of the dictionary."""
    batch: int = 256
    """Rows a step."""
    lr: float = 3e-3
    """Adam's learning rate."""

    def d_sae(self, job: Job) -> int:
        """Number of latents."""
        return self.latents

    def architecture(self) -> str:
        """The word in saehub.json."""
        return "topk"

    def memory(self, job: Job) -> int:
        """Bytes: parameters with gradients and two moments, and the dense pre-activations of a batch."""
        return 16 * self.latents * (2 * job.d_in + 1) + 12 * self.batch * self.latents

    def check(self, job: Job) -> Iterator[str]:
        """Problems with a job."""
        if job.target_site is not None:
            yield "the toy trainer trains autoencoders only; leave target_site out"
        elif job.d_in != job.d_out:
            yield f"an autoencoder needs d_in = d_out, here {job.d_in} and {job.d_out}"
        if not 1 <= self.k <= self.latents:
            yield f"k is {self.k}, the dictionary has {self.latents} latents"


@dataclass(frozen=True)
class ToyExtract:
    """Settings of `ToyExtractor`."""

    width: int = 16
    """Numbers a row."""
    sequences: int = 50
    """Sequences of 8 rows."""
    seed: int = 0
    """Other rows."""
