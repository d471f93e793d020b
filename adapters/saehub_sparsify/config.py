"""The `with:` of a recipe in, checked settings of the Sparsify trainers out; imports neither torch nor sparsify, so that a plan can ask everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from saehub.api import Job, ModelShape

WARMUP_STEPS = 1000
"""The library's own linear warm-up; longer than a short run, whose rate it would never let reach its peak."""
INITIAL_K = 10
"""k decay starts at this many latents per input dimension (trainer.py:197 of 1.3.3)."""

NO_RELU_MASK = (
    "sparsify's encoder gradient has no ReLU mask: where fewer than k pre-activations of a row are positive, latents that were selected with "
    "the value 0 are trained as if they were active (fused_encoder.py:53)"
)
AUXK_IDLE = (
    "sparsify's AuxK loss gives the encoder no gradient (fused_encoder.py:53): decoder rows of dead latents learn, their encoder rows do not, "
    "so that it revives none"
)
MULTI_TOPK_IDLE = (
    "sparsify's multi-topk loss gives the encoder no gradient (fused_encoder.py:53): it trains W_dec and b_dec only; "
    "and a latent counts as firing when it is among the 4k largest of a row"
)


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """What every Sparsify trainer takes; names and defaults are the library's where it has them."""

    transcode: ClassVar[bool] = False
    """Predict the target site from the input site."""
    skip: ClassVar[bool] = False
    """Add a linear path from the input to the output."""
    multi: ClassVar[bool] = False
    """Add the FVU of the 4k largest latents, weight 1/8, to the loss."""
    loss_fn: ClassVar[str] = "fvu"
    """The library's word for the loss."""
    auxk_alpha: ClassVar[float] = 0.0
    micro_acc_steps: ClassVar[int] = 1

    k: int = 32
    """Latents a row: L0 is at most k."""
    expansion: float | None = None
    """Latents per input dimension. None: 32, unless `width` is given."""
    width: int | None = None
    """Number of latents (d_sae), instead of `expansion`."""
    batch: int = 4096
    """Rows a step. The default rates of the library were chosen for about 65,000."""
    optimizer: Literal["signum", "adam", "muon"] = "signum"
    """`signum`: schedule-free sign descent with momentum 0.95; `adam`: torch's (the library would take an 8-bit one if bitsandbytes were
    there: results must not depend on that); `muon`: orthogonalised momentum for matrices, Adam for biases."""
    lr: float | None = None
    """Learning rate. None, by the library: signum 5e-3 / sqrt(d_sae / 2^14), adam 2e-4 / sqrt(d_sae / 2^14), muon 2e-3."""
    warmup: int | None = None
    """Steps of linear warm-up (adam, and muon's biases), before the linear decay to zero. None: 1000, at most a tenth of the run."""
    dead_after: int = 10_000_000
    """Rows without firing after which a latent counts as dead (`dead_feature_threshold`)."""
    normalize_decoder: bool = True
    """Decoder rows of unit norm before every step (autoencoders only: the library never norms a transcoder's)."""
    k_decay_steps: int = 0
    """Steps over which the number of active latents falls linearly from 10 d_in to k."""

    @property
    def activation_word(self) -> str:
        """`topk` or `groupmax`, the library's `activation`."""
        return "topk"

    def transcodes(self, job: Job) -> bool:
        """Whether the SAE of this job predicts another site than it reads."""
        return self.transcode

    def architecture(self) -> str:
        """The word in `saehub.json`."""
        return self.activation_word

    def d_sae(self, job: Job) -> int:
        """Number of latents."""
        return self.width if self.width is not None else max(1, round((32 if self.expansion is None else self.expansion) * job.d_in))

    def warmup_steps(self, job: Job) -> int:
        """`warmup`, or the library's, scaled to the run."""
        return self.warmup if self.warmup is not None else min(WARMUP_STEPS, job.steps // 10)

    def memory(self, job: Job) -> int:
        """Bytes at the peak: weights, gradients and the optimizer's moments; pre-activations, and the [rows, k, d] products of its backward pass."""
        latents = self.d_sae(job)
        weights = latents * (job.d_in + job.d_out + 1) + job.d_out + (job.d_in * job.d_out if self.skip else 0)
        rows = -(-self.batch // max(1, self.micro_acc_steps))
        moments = 2 if self.optimizer == "adam" else 1
        return 4 * ((3 + moments) * weights + rows * (3 * latents + 2 * self.k * job.d_in) + 6 * self.batch * (job.d_in + job.d_out))

    def cautions(self, job: Job) -> Iterator[str]:
        """What a user of the library would not know."""
        yield NO_RELU_MASK
        if self.auxk_alpha > 0:
            yield AUXK_IDLE
        if self.multi:
            yield MULTI_TOPK_IDLE

    def inexact_resume(self, job: Job) -> str | None:
        """On a CPU a resumed run is bit-identical with every optimizer; on a GPU the library's sums have no fixed order."""
        return "sparsify adds gradients atomically on CUDA (index_add_), in no fixed order" if job.device.startswith("cuda") else None

    def check(self, job: Job) -> Iterator[str]:
        """Problems with these settings for this job, each with its fix."""
        yield from self._check_numbers(job)
        yield from self._check_sites(job)
        latents = self.d_sae(job)
        if not 1 <= self.k <= latents:
            yield f"k is {self.k}; it must lie between 1 and the {latents} latents"
        elif self.activation_word == "groupmax":
            yield from self._check_groups(latents)
        elif self.multi and 4 * (self._first_k(job) if self.k_decay_steps else self.k) > latents:
            count = self._first_k(job) if self.k_decay_steps else self.k
            yield f"k is {count}{' at first' if self.k_decay_steps else ''}: multi_topk takes 4k = {4 * count} latents and there are {latents}; lower k, or raise width"
        if self.k_decay_steps > job.steps:
            yield f"k_decay_steps is {self.k_decay_steps} and the run has {job.steps} steps, so that k would not reach {self.k}; set it to at most {job.steps}"

    def _first_k(self, job: Job) -> int:
        return min(self.d_sae(job), INITIAL_K * job.d_in)

    def _check_groups(self, latents: int) -> Iterator[str]:
        if latents % self.k:
            fix = f"width {latents - latents % self.k} or {latents + self.k - latents % self.k}"
            yield f"k is {self.k}: groupmax takes the largest latent of each of k equal groups, and {latents} latents are not a multiple of it; {fix}"
        if self.k_decay_steps:
            yield "k_decay_steps does not go with groupmax: on its way k would not divide the latents; set it to 0"

    def _check_numbers(self, job: Job) -> Iterator[str]:
        if self.expansion is not None and self.width is not None:
            yield f"expansion {self.expansion:g} and width {self.width} are both given; leave one out"
        for name, least in (("width", 1), ("batch", 2), ("warmup", 0), ("dead_after", 1), ("k_decay_steps", 0), ("micro_acc_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}; it must be at least {least}"
        if self.expansion is not None and not self.expansion > 0:
            yield f"expansion is {self.expansion:g}; it must be above 0"
        if self.lr is not None and not 0 < self.lr < math.inf:
            yield f"lr is {self.lr:g}; it must be above 0 (leave it out for the library's rule)"
        if not 0 <= self.auxk_alpha < math.inf:
            yield f"auxk_alpha is {self.auxk_alpha:g}; it must be at least 0 (0 turns AuxK off)"
        if self.warmup is not None and self.warmup >= job.steps and self.optimizer != "signum":
            yield f"warmup is {self.warmup} steps of {job.steps}: the rate would never reach its peak; lower warmup, or leave it out"
        if self.micro_acc_steps > self.batch:
            yield f"micro_acc_steps is {self.micro_acc_steps}, more than the {self.batch} rows of a batch; lower it"

    def _check_sites(self, job: Job) -> Iterator[str]:
        transcodes = self.transcodes(job)
        if not transcodes and job.target_site is not None:
            yield f"target_site {job.target_site} is for a transcoder; use sparsify/transcoder or sparsify/skip_transcoder"
        if transcodes and job.target_site is None:
            yield "target_site is missing: a transcoder predicts one site from another, such as site: mlp_in.2, target_site: mlp_out.2"
        if job.d_in != job.d_out:
            yield f"sparsify's b_dec has the width of the input: d_in {job.d_in} must be d_out {job.d_out}; choose sites of equal width, or native/topk"


@dataclass(frozen=True, kw_only=True)
class RowsConfig(SparsifyConfig):
    """What the trainers on the hub's rows take beside."""

    auxk_alpha: float = 0.0
    """Weight of the AuxK loss on dead latents; 0 turns it off. Read the caution: it does not train the encoder."""
    micro_acc_steps: int = 1
    """Chunks that a batch is computed in, which saves memory; gradients add up to those of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class TopKConfig(RowsConfig):
    """`sparsify/topk`: the k largest of relu(W_enc (x - b_dec) + b_enc), a loss of FVU."""


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig(RowsConfig):
    """`sparsify/groupmax`: the largest of each of k contiguous groups of latents."""

    @property
    def activation_word(self) -> str:
        return "groupmax"


@dataclass(frozen=True, kw_only=True)
class MultiTopKConfig(RowsConfig):
    """`sparsify/multi_topk`: TopK whose loss also holds the FVU of the 4k largest latents, weight 1/8."""

    multi: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(RowsConfig):
    """`sparsify/transcoder`: a module's output from its input; the encoder does not subtract b_dec, W_dec starts at zero and is never normed."""

    transcode: ClassVar[bool] = True

    activation: Literal["topk", "groupmax"] = "topk"
    """Which latents of a row stay: the k largest, or the largest of each of k groups."""

    @property
    def activation_word(self) -> str:
        return self.activation


@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """`sparsify/skip_transcoder`: a transcoder with a linear path beside it, y += W_skip x."""

    skip: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig(SparsifyConfig):
    """`sparsify/end_to_end`: the SAE stands in the model, and the loss is the model's: `kl` to its own predictions without it, or `ce` of the text.

    An autoencoder of a module's output; or, with a `target_site`, a transcoder of the module between the two (mlp_in.2 and mlp_out.2).
    """

    loss: Literal["kl", "ce"] = "kl"
    """`kl`: divergence from the predictions of the model as it is; `ce`: cross-entropy of the next token."""
    activation: Literal["topk", "groupmax"] = "topk"
    """Which latents of a row stay: the k largest, or the largest of each of k groups."""
    skip_connection: bool = False
    """A linear path from the input to the output (transcoders only)."""

    @property
    def loss_fn(self) -> str:  # type: ignore[override]
        """The library's word."""
        return self.loss

    @property
    def skip(self) -> bool:  # type: ignore[override]
        """The library's word."""
        return self.skip_connection

    @property
    def activation_word(self) -> str:
        return self.activation

    def transcodes(self, job: Job) -> bool:
        return job.target_site is not None

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        if self.loss == "ce" and self.transcodes(job):
            yield (
                "under ce sparsify puts an identity in the place of a transcoder's module (trainer.py:343), "
                "so that b_dec starts at the mean of the module's input instead of its output"
            )

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if self.skip_connection and not self.transcodes(job):
            yield "skip_connection is for transcoders: name a target_site, or leave it out"

    def check_model(self, job: Job, shape: ModelShape, context: int) -> Iterator[str]:
        """Whether the sites are a module of this model that the library can replace, and a step holds a whole sequence."""
        from saehub.errors import UsageError
        from saehub_sparsify.names import hookpoint

        if self.batch < context:
            yield f"batch is {self.batch} positions, less than one sequence of {context}; raise batch, or lower data.train.context"
        try:
            hookpoint(job.site, job.target_site, shape)
        except UsageError as error:
            yield f"site {job.site}{f' to {job.target_site}' if job.target_site else ''}: {error.what}; {error.fix}"
