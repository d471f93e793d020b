"""The `with:` of a recipe in, checked settings of the native architectures without a fixed k out; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from saehub_native.config import TrainConfig

if TYPE_CHECKING:
    from saehub.api import Job


@dataclass(frozen=True, kw_only=True)
class DenseConfig(TrainConfig):
    """What the architectures take whose L0 is the outcome of a penalty."""

    START: ClassVar[float] = 0.01
    EXAMPLE: ClassVar[dict] = {"target_l0": 4.0, "width": 96, "batch": 256}

    target_l0: float | None = None
    """The mean L0 that training steers to. None: whatever `sparsity` leads to."""
    sparsity: float | None = None
    """λ, the weight of the penalty beside FVU; with `target_l0` the value it is steered from. None: only with `target_l0`."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which λ rises linearly."""
    clip: float | None = 1e-3
    """As of every native trainer, but small: most gradients get this norm, so that Adam's steps do not shrink as the error does."""
    revive: float = 1e-2
    """As of every native trainer; more of it, since nothing else revives latents here."""

    def first_l0(self, job: Job) -> int:
        """L0 at the start, for the encoder's scale: the target, or 32."""
        return max(1, min(self.d_sae(job), round(self.target_l0 if self.target_l0 is not None else 32)))

    def first_sparsity(self) -> float:
        """λ that steering starts from."""
        return self.START if self.sparsity is None else self.sparsity

    def memory(self, job: Job) -> int:
        """As every native trainer, and a dozen chunks of dense activations."""
        return super().memory(job) + 12 * max(16 << 20, 64 * 4 * self.d_sae(job))

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        latents = self.d_sae(job)
        if self.target_l0 is None and self.sparsity is None:
            yield "target_l0 is missing, and sparsity too; give the L0 to reach, or the weight of the penalty"
        if self.target_l0 is not None and not 0 < self.target_l0 <= latents:
            yield f"target_l0 is {self.target_l0:g}; it must lie above 0 and be at most the {latents} latents"
        if self.sparsity is not None and not 0 < self.sparsity < math.inf:
            yield f"sparsity is {self.sparsity:g}; it must be above 0"
        if not 0 <= self.sparsity_warmup <= 1:
            yield f"sparsity_warmup is {self.sparsity_warmup:g}; it is a share of the steps, from 0 to 1"


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(DenseConfig):
    """`native/relu`: f = relu(p) under an L1 penalty weighted by the decoder's norms (Anthropic, April 2024), with p-annealing if wanted."""

    objective: ClassVar[str] = "saehub_native.architectures.relu:ReLU"

    LR_MAX: ClassVar[float] = 0.02

    p_anneal: float = 0.8
    """Share of the steps, at the end, over which the exponent of the penalty falls from 1 to `p_end`; 0: L1 throughout."""
    p_end: float = 0.3
    """The last exponent of `p_anneal`."""

    def architecture(self) -> str:
        return "relu"

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if not 0 <= self.p_anneal <= 1:
            yield f"p_anneal is {self.p_anneal:g}; it is a share of the steps, from 0 to 1"
        if not 0 < self.p_end <= 1:
            yield f"p_end is {self.p_end:g}; it must lie above 0 and be at most 1"


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(DenseConfig):
    """`native/jumprelu`: a threshold a latent, trained straight through (GDM 2024, arXiv 2407.14435; Anthropic, January 2025)."""

    objective: ClassVar[str] = "saehub_native.architectures.jumprelu:JumpReLU"
    LR_MAX: ClassVar[float] = 0.02

    penalty: Literal["tanh", "l0"] = "tanh"
    """`tanh`: Anthropic's, steered to `target_l0` through λ; `l0`: GDM's, with `target_l0` in the penalty itself."""
    bandwidth: float = 0.1
    """Width of the straight-through rectangle, in units of √V, the targets' root mean squared distance from their mean."""
    tanh_scale: float = 12.0
    """c of the tanh penalty."""
    preact: float = 0.0
    """Weight of the tanh recipe's pull of latents below their threshold."""

    def architecture(self) -> str:
        return "jumprelu"

    def first_sparsity(self) -> float:
        return self.sparsity if self.sparsity is not None else 1.0 if self.penalty == "l0" else self.START

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if not self.bandwidth > 0:
            yield f"bandwidth is {self.bandwidth:g}; it must be above 0"
        if not self.tanh_scale > 0:
            yield f"tanh_scale is {self.tanh_scale:g}; it must be above 0"
        if self.preact < 0:
            yield f"preact is {self.preact:g}; it must be at least 0 (0 turns it off)"


@dataclass(frozen=True, kw_only=True)
class GatedConfig(DenseConfig):
    """`native/gated`: a gate decides which latents fire, a magnitude how much (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    objective: ClassVar[str] = "saehub_native.architectures.gated:Gated"
    LR_MAX: ClassVar[float] = 0.02

    def architecture(self) -> str:
        return "gated"
