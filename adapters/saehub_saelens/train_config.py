"""The `with:` of a recipe in, checked settings of SAELens' eight training architectures out: its own names and defaults; imports no torch.

Two defaults differ from SAELens': `k` must be given, and the threshold of batchtopk and matryoshka is set on calibration rows, because
SAELens' running one starts at 0 (see `threshold`). Steps, not tokens, are the unit of every window and warm-up, as in SAELens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from saehub.api import Job

OWN = ("expansion", "width", "batch", "calibration", "threshold")
"""Settings of ours: SAELens has no word for them."""
TRAINER = (
    "lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "adam_beta1", "adam_beta2", "autocast",
    "dead_feature_window", "feature_sampling_window",
)  # fmt: skip
"""Settings of its `SAETrainerConfig`; all others belong to the training config of the architecture."""
RUN_TIME_NORMS = ("layer_norm", "constant_norm_rescale")
ESTIMATED_NORMS = ("expected_average_only_in", "covariance_whitening")
SETTLED = 0.99
"""Share of its steady value that a running threshold must have reached."""


@dataclass(frozen=True, kw_only=True)
class SAELensConfig:
    """What every SAELens trainer takes."""

    word: ClassVar[str] = ""
    """SAELens' name of the architecture."""
    ours: ClassVar[str] = ""
    """saehub's name of what comes out."""

    expansion: float | None = None
    """Latents per input dimension: d_sae = round(expansion · d_in). None: 8, unless `width` is given."""
    width: int | None = None
    """Number of latents (d_sae), instead of `expansion`."""
    batch: int = 4096
    """Rows a step (SAELens' train_batch_size_tokens)."""
    lr: float = 3e-4
    """Peak learning rate of Adam."""
    lr_end: float | None = None
    """Where the two cosine schedules end. None: lr / 10."""
    lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    """Schedule between warm-up and decay."""
    lr_warm_up_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    lr_decay_steps: int = 0
    """Steps at the end over which it falls linearly to zero."""
    n_restart_cycles: int = 1
    """Cycles of `cosineannealingwarmrestarts`."""
    adam_beta1: float = 0.9
    """Adam's decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay rate of the second moment."""
    autocast: bool = False
    """Forward pass in bfloat16 autocast (parameters stay float32)."""
    dead_feature_window: int = 1000
    """Steps without firing after which a latent counts as dead."""
    feature_sampling_window: int = 2000
    """Steps over which SAELens counts firing frequencies."""
    decoder_init_norm: float | None = 0.1
    """Norm of the decoder's rows at the start; None: as Kaiming's initialisation leaves them."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec before encoding."""
    normalize_activations: Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"] = "none"
    """SAELens' own normalisation, on top of the recipe's `extract.normalize`. The estimated ones are estimated from calibration rows."""
    calibration: int = 8192
    """Calibration rows, never training rows, for estimated norms and thresholds: so many, or all there are."""

    def architecture(self) -> str:
        """The word in `saehub.json`."""
        return self.ours

    def d_sae(self, job: Job) -> int:
        """Number of latents."""
        return self.width if self.width is not None else max(1, round((8 if self.expansion is None else self.expansion) * job.d_in))

    def memory(self, job: Job) -> int:
        """Bytes at the peak: parameters with gradients and Adam's two moments, and a dozen dense [batch, d_sae] tensors of autograd."""
        parameters = self.d_sae(job) * (2 * job.d_in + 3) + job.d_in
        return 4 * (4 * parameters + 12 * self.batch * self.d_sae(job) + 6 * self.batch * job.d_in) + (400 << 20)

    def sae_settings(self, job: Job) -> dict[str, Any]:
        """Keyword arguments of SAELens' training config of this architecture."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in (*OWN, *TRAINER)}
        return {"d_in": job.d_in, "d_sae": self.d_sae(job), "dtype": "float32", "device": job.device, **named}

    def trainer_settings(self, job: Job) -> dict[str, Any]:
        """Keyword arguments of SAELens' `SAETrainerConfig`."""
        settings = {name: getattr(self, name) for name in TRAINER}
        settings["lr_end"] = self.lr / 10 if self.lr_end is None else self.lr_end  # SAETrainer asserts that it is given
        return {
            **settings, "device": job.device, "total_training_samples": job.steps * job.batch, "train_batch_size_samples": job.batch,
            "n_checkpoints": 0,
        }  # fmt: skip

    def check(self, job: Job) -> Iterator[str]:
        """Problems with these settings for this job, each with its fix."""
        if job.target_site is not None:
            yield "SAELens trains autoencoders only (it loads transcoders, but has no training class for them); leave target_site out, or use native or sparsify"
        elif job.d_in != job.d_out:
            yield f"an autoencoder needs d_in = d_out, here {job.d_in} and {job.d_out}"
        if self.expansion is not None and self.width is not None:
            yield f"expansion {self.expansion:g} and width {self.width} are both given; leave one out"
        if self.expansion is not None and not self.expansion > 0:
            yield f"expansion is {self.expansion:g}; it must be above 0"
        if self.width is not None and self.width < 1:
            yield f"width is {self.width}; it must be at least 1"
        if self.batch < 1:
            yield f"batch is {self.batch}; it must be at least 1"
        if not 0 < self.lr < math.inf:
            yield f"lr is {self.lr:g}; it must be above 0"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name):g}; it must lie in [0, 1)"
        for name in ("dead_feature_window", "feature_sampling_window", "n_restart_cycles", "calibration"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1"
        for name in ("lr_warm_up_steps", "lr_decay_steps"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name)}; it is a number of steps"
        yield from self._check_schedule(job)
        if self.decoder_init_norm is not None and not self.decoder_init_norm > 0:
            yield f"decoder_init_norm is {self.decoder_init_norm:g}; it must be above 0, or null"
        if self.normalize_activations in RUN_TIME_NORMS and job.normalize != "none":
            yield f"normalize_activations {self.normalize_activations} removes the scale of every row, so extract.normalize: {job.normalize} cannot be undone; set extract.normalize: none"
        if self.normalize_activations == "covariance_whitening" and 0 < job.calibration <= job.d_in:
            yield f"normalize_activations covariance_whitening needs more calibration rows than dimensions: {job.calibration} <= {job.d_in}; raise extract.calibration"

    def _check_schedule(self, job: Job) -> Iterator[str]:
        main = job.steps - self.lr_warm_up_steps - self.lr_decay_steps
        if main < 1:
            yield f"lr_warm_up_steps {self.lr_warm_up_steps} and lr_decay_steps {self.lr_decay_steps} leave none of the {job.steps} steps; shorten them"
        elif self.lr_scheduler_name == "cosineannealingwarmrestarts" and main < self.n_restart_cycles:
            yield f"n_restart_cycles is {self.n_restart_cycles}, there are {main} steps; fewer cycles"
        if self.lr_end is not None and not 0 <= self.lr_end <= self.lr:
            yield f"lr_end is {self.lr_end:g}; it must lie between 0 and lr"
        if self.lr_end == 0 and self.lr_decay_steps > 0 and self.lr_scheduler_name != "constant":
            yield "lr_end is 0 and lr_decay_steps is given: SAELens refuses to decay from 0 to 0; leave lr_decay_steps out, or raise lr_end"

    def cautions(self, job: Job) -> Iterator[str]:
        """What a user of these settings would not know."""
        if job.normalize == "none" and self.normalize_activations == "none":
            yield "SAELens clips every gradient to norm 1 (fixed in its code), in the units of the rows: extract.normalize: sqrt_d makes that mean the same at every site"
        for name in ("l1_warm_up_steps", "l0_warm_up_steps"):
            if getattr(self, name, 0) > job.steps:
                yield f"{name} is {getattr(self, name)}, the run has {job.steps} steps: the sparsity coefficient never reaches its full value"


@dataclass(frozen=True, kw_only=True)
class L1Config(SAELensConfig):
    """The L1 penalty of standard and gated."""

    l1_coefficient: float = 1.0
    """Weight of the sparsity penalty."""
    l1_warm_up_steps: int = 0
    """Steps over which it rises linearly from 0."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        for name in ("l1_coefficient", "l1_warm_up_steps"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name):g}; it must be at least 0"


@dataclass(frozen=True, kw_only=True)
class StandardConfig(L1Config):
    """`saelens/standard`: relu with an L1 penalty on f ‖W_dec‖ (Anthropic, April 2024)."""

    word: ClassVar[str] = "standard"
    ours: ClassVar[str] = "relu"

    lp_norm: float = 1.0
    """The p of the penalty's p-norm."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if not self.lp_norm > 0:
            yield f"lp_norm is {self.lp_norm:g}; it must be above 0"


@dataclass(frozen=True, kw_only=True)
class GatedConfig(L1Config):
    """`saelens/gated`: a gate and a magnitude (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    word: ClassVar[str] = "gated"
    ours: ClassVar[str] = "gated"


@dataclass(frozen=True, kw_only=True)
class SelectConfig(SAELensConfig):
    """What the architectures that select by size share."""

    aux_loss_coefficient: float = 1.0
    """Weight of the loss by which dead latents rebuild the error."""
    rescale_acts_by_decoder_norm: bool = True
    """Compare p ‖W_dec‖, so that the decoder's norms are free to drift."""
    use_sparse_activations: bool = False
    """Features as a sparse tensor in the forward pass."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        k, latents = self.k, self.d_sae(job)  # type: ignore[attr-defined]
        if not 0 < k <= max(1, latents):
            yield f"k is {k:g}, the dictionary has {latents} latents; it must lie between 1 and that"
        if self.aux_loss_coefficient < 0:
            yield f"aux_loss_coefficient is {self.aux_loss_coefficient:g}; it must be at least 0"
        if self.normalize_activations in RUN_TIME_NORMS:
            yield f"normalize_activations {self.normalize_activations}: SAELens' auxiliary loss raises with it as soon as a latent is dead; use none, and extract.normalize"
        if self.use_sparse_activations and (self.rescale_acts_by_decoder_norm or self.autocast):
            yield "use_sparse_activations: SAELens' backward pass fails on sparse features scaled by decoder norms (and under autocast); set rescale_acts_by_decoder_norm: false"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        if self.aux_loss_coefficient > 0 and self.dead_feature_window >= job.steps:
            yield (
                f"dead_feature_window is {self.dead_feature_window} steps, the run has {job.steps}: no latent can count as dead, so the auxiliary "
                "loss never acts; lower it"
            )


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SelectConfig):
    """`saelens/topk`: the k largest pre-activations of each row, then relu (Gao et al. 2024, arXiv 2406.04093)."""

    word: ClassVar[str] = "topk"
    ours: ClassVar[str] = "topk"

    k: int
    """Latents a row: L0 is at most k."""


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(SelectConfig):
    """`saelens/abstopk`: the k largest absolute pre-activations, signs kept."""

    word: ClassVar[str] = "abstopk"
    ours: ClassVar[str] = "abstopk"

    k: int
    """Latents a row."""


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(SelectConfig):
    """`saelens/batchtopk`: the k·n largest of a batch of n rows (Bussmann et al. 2024, arXiv 2412.06410); one threshold afterwards."""

    word: ClassVar[str] = "batchtopk"
    ours: ClassVar[str] = "batchtopk"

    k: float
    """Mean latents a row."""
    topk_threshold_lr: float = 0.01
    """Rate of SAELens' running threshold, an exponential mean of the smallest value that a batch kept."""
    threshold: Literal["calibrated", "running"] = "calibrated"
    """`calibrated`: the θ that lets k latents a row through on calibration rows. `running`: SAELens' own, which starts at 0 and is not corrected for
    it: after 100 steps at rate 0.01 it has reached 63 % of its value, and L0 is several times k."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if not 0 < self.topk_threshold_lr <= 1:
            yield f"topk_threshold_lr is {self.topk_threshold_lr:g}; it must lie in (0, 1]"
        if int(self.k * job.batch) < 1:
            yield f"k is {self.k:g}: not one latent in a batch of {job.batch} rows; raise k or batch"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        reached = 1 - (1 - self.topk_threshold_lr) ** job.steps
        if self.threshold == "running" and reached < SETTLED:
            yield (
                f"threshold running: SAELens' mean starts at 0 and has reached {reached:.0%} of its value after {job.steps} steps, so L0 will exceed k; "
                "threshold: calibrated sets it on calibration rows"
            )


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """`saelens/matryoshka_batchtopk`: batchtopk whose nested prefixes must each reconstruct (Bussmann et al. 2025, arXiv 2503.17547)."""

    word: ClassVar[str] = "matryoshka_batchtopk"
    ours: ClassVar[str] = "matryoshka"

    matryoshka_widths: tuple[int, ...] | None = None
    """Widths of the nested dictionaries; SAELens adds d_sae where it is not the last. None: an eighth, a quarter, a half and all of d_sae."""
    use_matryoshka_aux_loss: bool = False
    """Dead latents rebuild the error of their own level."""

    def widths(self, job: Job) -> tuple[int, ...]:
        """`matryoshka_widths`, or the default, up to d_sae."""
        latents = self.d_sae(job)
        chosen = self.matryoshka_widths or tuple(sorted({max(1, latents // part) for part in (8, 4, 2)}))
        return chosen if chosen[-1] == latents else (*chosen, latents)

    def sae_settings(self, job: Job) -> dict[str, Any]:
        return {**super().sae_settings(job), "matryoshka_widths": list(self.widths(job))}

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        ends = (0, *self.widths(job))
        if any(left >= right for left, right in zip(ends, ends[1:], strict=False)):
            yield f"matryoshka_widths {list(ends[1:])} must increase, from 1 to the {self.d_sae(job)} latents"


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(SAELensConfig):
    """`saelens/jumprelu`: a trained threshold for every latent (Rajamanoharan et al. 2024, arXiv 2407.14435; tanh as Anthropic, January 2025)."""

    word: ClassVar[str] = "jumprelu"
    ours: ClassVar[str] = "jumprelu"

    jumprelu_init_threshold: float = 0.01
    """Threshold at the start."""
    jumprelu_bandwidth: float = 0.05
    """Width of the straight-through estimator, in units of pre-activations."""
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    """`step`: L0 (DeepMind); `tanh`: Anthropic's; `quadratic`: around `target_l0` (Gemma Scope 2)."""
    l0_coefficient: float = 1.0
    """Weight of the sparsity loss."""
    l0_warm_up_steps: int = 0
    """Steps over which it rises linearly from 0."""
    pre_act_loss_coefficient: float | None = None
    """Weight of Anthropic's loss on the pre-activations of dead latents (they use 3e-6); None: without."""
    jumprelu_tanh_scale: float = 4.0
    """Scale inside the tanh."""
    jumprelu_ste_to_input: bool = False
    """Whether the estimator also passes gradients to the encoder (Anthropic) or to the threshold alone (DeepMind)."""
    target_l0: float | None = None
    """Active latents a row that `quadratic` aims at."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        for name in ("jumprelu_init_threshold", "l0_coefficient", "l0_warm_up_steps"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name):g}; it must be at least 0"
        for name in ("jumprelu_bandwidth", "jumprelu_tanh_scale"):
            if not getattr(self, name) > 0:
                yield f"{name} is {getattr(self, name):g}; it must be above 0"
        if self.jumprelu_sparsity_loss_mode == "quadratic" and not (self.target_l0 or 0) > 0:
            yield f"target_l0 is {self.target_l0}; the quadratic loss needs the L0 that it aims at"
        if self.pre_act_loss_coefficient is not None and self.pre_act_loss_coefficient < 0:
            yield f"pre_act_loss_coefficient is {self.pre_act_loss_coefficient:g}; it must be at least 0, or null"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        if self.pre_act_loss_coefficient and self.dead_feature_window >= job.steps:
            yield f"dead_feature_window is {self.dead_feature_window} steps, the run has {job.steps}: no latent can count as dead, so the pre-activation loss never acts; lower it"


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig(SAELensConfig):
    """`saelens/matching_pursuit`: latents chosen one after another, each the best for what is left; the encoder is the decoder."""

    word: ClassVar[str] = "matching_pursuit"
    ours: ClassVar[str] = "matching_pursuit"

    residual_threshold: float = 1e-2
    """Stop when the norm of what is left falls below it."""
    max_iterations: int | None = None
    """Most latents a row; None: d_in."""
    stop_on_duplicate_support: bool = True
    """Stop when a row's set of latents did not change."""
    decoder_init_norm: float | None = 1.0
    """Norm of the decoder's rows at the start: SAELens allows 1 only."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if self.decoder_init_norm != 1.0:
            yield f"decoder_init_norm is {self.decoder_init_norm}; SAELens' matching pursuit starts from rows of norm 1"
        if self.normalize_activations == "covariance_whitening":
            yield "normalize_activations covariance_whitening cannot be folded into an encoder that is its decoder; use none"
        if self.residual_threshold < 0:
            yield f"residual_threshold is {self.residual_threshold:g}; it must be at least 0"
        if self.max_iterations is not None and self.max_iterations < 1:
            yield f"max_iterations is {self.max_iterations}; it must be at least 1, or null"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        if self.max_iterations is None:
            yield f"max_iterations is not set: a row may take up to d_in = {job.d_in} latents, each a pass over the dictionary"


CONFIGS: tuple[type[SAELensConfig], ...] = (
    StandardConfig, GatedConfig, TopKConfig, AbsTopKConfig, JumpReLUConfig, BatchTopKConfig, MatryoshkaConfig, MatchingPursuitConfig,
)  # fmt: skip
"""All of them, one for each trainer `saelens/<word>`."""
