"""The `with:` of a recipe in, checked settings of dictionary_learning's trainers out; torch-free, and everything that depends on the run's length is said here.

Names and meanings are the library's. What it counts in steps may be given as a share of the run too (a number below 1), and left out it is the
library's own default, scaled down where the run is too short for it (`resolved`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from saehub.api import Job

LIBRARY_STEPS = {"warmup_steps": (1000, 0.1), "sparsity_warmup_steps": (2000, 0.2), "threshold_start_step": (1000, 0.5), "anneal_start": (15000, 0.5)}
"""Setting -> the library's default, and the share of a shorter run that stands for it."""
DEAD_ROWS = 10_000_000
"""Rows without firing after which the library calls a latent dead."""
THRESHOLD_BETA = 0.999
"""The library's decay of its moving average of the threshold."""


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """What every trainer of the library takes."""

    trainer: ClassVar[str] = ""
    """`"package.module:Class"` in the library."""
    word: ClassVar[str] = ""
    """saehub's architecture."""
    own: ClassVar[tuple[str, ...]] = ()
    """Settings that go to the library as they are, where they are not None."""
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "decay_start")
    """Settings that go to the library in steps."""
    tensors: ClassVar[int] = 4
    """Dense [batch, latents] tensors at the peak of a step, for `memory`."""

    expansion: float | None = None
    """Latents per input dimension: dict_size = round(expansion · activation_dim). None: 8, unless `width` is given."""
    width: int | None = None
    """dict_size, instead of `expansion`."""
    batch: int = 2048
    """Rows a step."""
    lr: float | None = None
    """Learning rate of Adam. None: the library's own default, which suits rows of mean square norm 1."""
    warmup_steps: float | None = None
    """Steps over which the learning rate rises; below 1 a share of the run. None: 1000, at most a tenth of the run."""
    decay_start: float | None = None
    """Step at which the learning rate starts to fall linearly to 0; below 1 a share of the run. None: it never falls."""
    normalize_activations: bool = True
    """Divide rows by √(mean ‖x‖²) of the calibration rows and fold it back into the result by the library's `scale_biases`: what its loop
    calls `normalize_activations`. Learning rates, thresholds and bandwidths of its defaults are made for that."""
    calibration: int = 8192
    """Calibration rows, never training rows, that give the norm: so many, or all there are."""

    # ------------------------------------------------------------------ what a plan asks
    def architecture(self) -> str:
        """The word in `saehub.json`."""
        return self.word

    def d_sae(self, job: Job) -> int:
        """Number of latents."""
        return self.width if self.width is not None else max(1, round((8 if self.expansion is None else self.expansion) * job.d_in))

    def memory(self, job: Job) -> int:
        """Bytes at the peak of a step: parameters with gradients, Adam's two moments and scratch; rows; dense activations (nothing of the library is sparse)."""
        latents = self.d_sae(job)
        parameters = latents * (2 * job.d_in + 4) + 2 * job.d_in
        return 4 * (6 * parameters + self.batch * (8 * job.d_in + self.tensors * latents)) + (8 << 20)

    def check(self, job: Job) -> Iterator[str]:
        """Problems with these settings for this job."""
        if job.target_site is not None:
            yield "dictionary_learning trains autoencoders only (its `transcoder` flag changes nothing but its log); leave target_site out"
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
        if self.lr is not None and not 0 < self.lr < math.inf:
            yield f"lr is {self.lr:g}; it must be above 0"
        if self.calibration < 1:
            yield f"calibration is {self.calibration}; at least one row is needed"
        for name in self.in_steps:
            value = getattr(self, name)
            if value is not None and not (0 <= value < job.steps and (value < 1 or value == int(value))):
                yield f"{name} is {value:g}; it must be a whole number of steps below the run's {job.steps}, or a share of them below 1"
                return
        steps = self.resolved(job)
        decay = steps.get("decay_start")
        for name in ("warmup_steps", "sparsity_warmup_steps"):
            if decay is not None and name in steps and decay <= steps[name]:
                yield f"decay_start is step {decay}, {name} ends at {steps[name]}; the library wants it later"

    # ------------------------------------------------------------------ what the library is given
    def resolved(self, job: Job) -> dict[str, int]:
        """Setting -> steps, as passed to the library: as given, or its default, scaled down where the run is shorter."""
        found: dict[str, int] = {}
        for name in self.in_steps:
            value = getattr(self, name)
            if value is None and name in LIBRARY_STEPS:
                default, share = LIBRARY_STEPS[name]
                found[name] = min(default, int(share * job.steps))
            elif value is not None:
                found[name] = int(value) if value >= 1 else int(value * job.steps)
        return found

    def settings(self, job: Job) -> dict[str, Any]:
        """Keyword arguments of the library's trainer, but for sizes, seed and device."""
        given = {name: getattr(self, name) for name in ("lr", *self.own)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value is not None}
        return plain | self.resolved(job)

    def attributes(self, job: Job) -> dict[str, int]:
        """Attributes set on the library's trainer once it is made: what its constructor does not take."""
        return {}

    def scaled(self, job: Job) -> dict[str, tuple[float, float]]:
        """Setting -> (library's default, value here), of those that a short run changed."""
        found = {name: (LIBRARY_STEPS[name][0], steps) for name, steps in self.resolved(job).items() if name in LIBRARY_STEPS and getattr(self, name) is None}
        return {name: pair for name, pair in found.items() if pair[0] != pair[1]}

    def cautions(self, job: Job) -> Iterator[str]:
        """What a user of the library would not know."""
        scaled = self.scaled(job)
        if scaled:
            words = ", ".join(f"{name} {value:g} (not {default:g})" for name, (default, value) in scaled.items())
            yield f"the library's defaults are for longer runs than {job.steps} steps; scaled here: {words}"


@dataclass(frozen=True, kw_only=True)
class StandardConfig(DictionaryConfig):
    """`dictionary_learning/standard`: ReLU, Σe² + λ‖f‖₁, decoder rows of norm 1 (Bricken et al. 2023)."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.standard:StandardTrainer"
    word: ClassVar[str] = "relu"
    own: ClassVar[tuple[str, ...]] = ("l1_penalty",)
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "sparsity_warmup_steps", "decay_start", "resample_steps")

    l1_penalty: float = 0.1
    """λ."""
    sparsity_warmup_steps: float | None = None
    """Steps over which λ rises; below 1 a share of the run. None: 2000, at most a fifth of the run."""
    resample_steps: float | None = None
    """Every so many steps, latents silent for half of them are set to rows that are reconstructed badly; below 1 a share of the run. The
    learning rate then warms up again each time. None: never."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        yield from _not_negative(self, "l1_penalty")
        if self.resample_steps is not None:
            if self.decay_start is not None:
                yield "resample_steps and decay_start exclude each other in the library; leave one out"
            steps = self.resolved(job)
            if 0 <= self.resample_steps < job.steps and not steps["resample_steps"]:
                yield f"resample_steps is {self.resample_steps:g} of {job.steps} steps; it must be at least one step"
            elif steps.get("warmup_steps") == 0:
                yield "warmup_steps is 0; with resample_steps the library divides by it"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        yield "the library leaves the encoder's bias at PyTorch's random start, U(±1/√d): some latents start with a positive bias"


@dataclass(frozen=True, kw_only=True)
class StandardAprilConfig(DictionaryConfig):
    """`dictionary_learning/standard_april`: ReLU, Σe² + λ Σ f‖d‖, decoder rows free (Anthropic's April 2024 update)."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.standard:StandardTrainerAprilUpdate"
    word: ClassVar[str] = "relu"
    own: ClassVar[tuple[str, ...]] = ("l1_penalty",)
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "sparsity_warmup_steps", "decay_start")

    l1_penalty: float = 0.1
    """λ."""
    sparsity_warmup_steps: float | None = None
    """Steps over which λ rises; below 1 a share of the run. None: 2000, at most a fifth of the run."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        yield from _not_negative(self, "l1_penalty")

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        yield "the library leaves the encoder's bias at PyTorch's random start, U(±1/√d): some latents start with a positive bias"


@dataclass(frozen=True, kw_only=True)
class TopKConfig(DictionaryConfig):
    """`dictionary_learning/topk`: the k largest of each row (Gao et al. 2024), AuxK from the rectified activations."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.top_k:TopKTrainer"
    word: ClassVar[str] = "topk"
    own: ClassVar[tuple[str, ...]] = ("k", "auxk_alpha")
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "decay_start", "threshold_start_step")
    tensors: ClassVar[int] = 6
    needs_threshold: ClassVar[bool] = False

    k: int
    """Latents a row."""
    auxk_alpha: float = 1 / 32
    """Weight of AuxK, which pulls dead latents towards the residual; 0 turns it off."""
    dead_after: int | None = None
    """Rows without firing after which a latent is dead (`dead_feature_threshold`). None: the library's ten million, at most 1/32 of the run
    and at least 8 batches."""
    threshold_start_step: float | None = None
    """Step after which the threshold is tracked; below 1 a share of the run. None: 1000, at most half of the run."""
    threshold_beta: float | None = None
    """Decay of the threshold's moving average. None: 0.999, less in a run so short that the average would be of its beginning."""

    def settings(self, job: Job) -> dict[str, Any]:
        return super().settings(job) | {"threshold_beta": self.beta(job)}

    def beta(self, job: Job) -> float:
        """`threshold_beta`, or the library's, with an average over a twentieth of the run at most: 1 - 1 / max(1, steps / 20)."""
        if self.threshold_beta is not None:
            return self.threshold_beta
        return min(THRESHOLD_BETA, 1 - 1 / max(1.0, job.steps / 20))

    def attributes(self, job: Job) -> dict[str, int]:
        dead = self.dead_after if self.dead_after is not None else min(DEAD_ROWS, max(8 * self.batch, job.rows // 32))
        return {"dead_feature_threshold": dead}

    def scaled(self, job: Job) -> dict[str, tuple[float, float]]:
        found = super().scaled(job)
        if self.dead_after is None and (dead := self.attributes(job)["dead_feature_threshold"]) != DEAD_ROWS:
            found["dead_feature_threshold"] = (DEAD_ROWS, dead)
        if self.threshold_beta is None and self.beta(job) != THRESHOLD_BETA:
            found["threshold_beta"] = (THRESHOLD_BETA, self.beta(job))
        return found

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        latents = self.d_sae(job)
        if not 1 <= self.k <= latents:
            yield f"k is {self.k}; it must lie between 1 and the {latents} latents"
        yield from _not_negative(self, "auxk_alpha")
        if self.dead_after is not None and self.dead_after < 1:
            yield f"dead_after is {self.dead_after} rows; it must be at least 1"
        if self.threshold_beta is not None and not 0 <= self.threshold_beta < 1:
            yield f"threshold_beta is {self.threshold_beta:g}; it must lie in [0, 1)"
        start = self.resolved(job).get("threshold_start_step", 0)
        if self.needs_threshold and job.steps - 1 <= start:
            yield (
                f"threshold_start_step is {start}, the last step {job.steps - 1}: the threshold would never be set, and encode() would be a plain "
                "ReLU; lower it, or train longer"
            )

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        if self.needs_threshold:
            start = self.resolved(job)["threshold_start_step"]
            yield (
                f"it trains with the {self.k} · rows largest of a batch and is used with one threshold, a moving average since step {start}: L0 in use is "
                f"near {self.k}, not exactly that; a checkpoint of before that step is a plain ReLU"
            )
        if self.auxk_alpha > 0:
            yield "its AuxK reads activations after the ReLU: a dead latent that is negative on every row of a batch gets no gradient from it"


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(TopKConfig):
    """`dictionary_learning/batch_topk`: the k · rows largest of a batch in training, one threshold in use (Bussmann et al. 2024)."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.batch_top_k:BatchTopKTrainer"
    word: ClassVar[str] = "batchtopk"
    needs_threshold: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKConfig(BatchTopKConfig):
    """`dictionary_learning/matryoshka_batch_topk`: BatchTopK whose first latents must reconstruct alone, group by group."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer"
    word: ClassVar[str] = "matryoshka"
    own: ClassVar[tuple[str, ...]] = ("k", "auxk_alpha", "group_fractions", "group_weights")
    tensors: ClassVar[int] = 7

    group_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Shares of the latents in each group; they sum to 1 (the default is that of the library's demo)."""
    group_weights: tuple[float, ...] | None = None
    """Weight of each prefix's loss. None: all 1 / groups."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        fractions, latents = self.group_fractions, self.d_sae(job)
        if not fractions or not all(0 < share <= 1 for share in fractions) or not math.isclose(sum(fractions), 1.0):
            yield f"group_fractions are {list(fractions)}; they must be above 0 and sum to 1"
        elif min(int(share * latents) for share in fractions[:-1] or (1.0,)) < 1:
            yield f"group_fractions {list(fractions)} leave a group of the {latents} latents empty; fewer groups, or more latents"
        if self.group_weights is not None and len(self.group_weights) != len(fractions):
            yield f"group_weights has {len(self.group_weights)} entries, group_fractions {len(fractions)}"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        groups = len(self.group_fractions)
        if groups > 1 and self.group_weights is None:
            yield (
                f"the library averages over its {groups} groups twice (weights 1/{groups}, then a mean): the reconstruction loss is 1/{groups * groups} of the "
                f"sum, so AuxK weighs {groups} times more than it would with one mean; group_weights: {[1] * groups} undoes one of them"
            )


@dataclass(frozen=True, kw_only=True)
class JumpReluConfig(DictionaryConfig):
    """`dictionary_learning/jump_relu`: p·[p > θ] with θ learnt by a straight-through estimator (Rajamanoharan et al. 2024b), L0 held at a target."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.jumprelu:JumpReluTrainer"
    word: ClassVar[str] = "jumprelu"
    own: ClassVar[tuple[str, ...]] = ("bandwidth", "sparsity_penalty", "target_l0")
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "sparsity_warmup_steps", "decay_start")
    tensors: ClassVar[int] = 9

    target_l0: float = 20.0
    """Latents a row that the penalty pulls towards."""
    sparsity_penalty: float = 1.0
    """Weight of (L0 / target_l0 - 1)²."""
    bandwidth: float = 0.001
    """Width of the window around θ in which θ gets a gradient, in units of the rows (of mean square norm 1 when normalised)."""
    sparsity_warmup_steps: float | None = None
    """Steps over which the penalty rises; below 1 a share of the run. None: 2000, at most a fifth of the run."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        yield from _not_negative(self, "sparsity_penalty")
        for name in ("target_l0", "bandwidth"):
            if not getattr(self, name) > 0:
                yield f"{name} is {getattr(self, name):g}; it must be above 0"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        yield "the library ignores the seed of this trainer; saehub seeds PyTorch before it makes the dictionary"
        yield (
            "its L0 penalty looks at activations after the jump, so only latents just above θ (half of the window) move θ; and it trains without the "
            "ReLU that encode() has, which differs where θ is negative"
        )


@dataclass(frozen=True, kw_only=True)
class GatedConfig(DictionaryConfig):
    """`dictionary_learning/gated`: gate and magnitude (Rajamanoharan et al. 2024a), L1 on the gate and its auxiliary reconstruction."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.gdm:GatedSAETrainer"
    word: ClassVar[str] = "gated"
    own: ClassVar[tuple[str, ...]] = ("l1_penalty",)
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "sparsity_warmup_steps", "decay_start")
    tensors: ClassVar[int] = 9

    l1_penalty: float = 0.1
    """λ on the rectified gate."""
    sparsity_warmup_steps: float | None = None
    """Steps over which λ rises; below 1 a share of the run. None: 2000, at most a fifth of the run."""

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        yield from _not_negative(self, "l1_penalty")


@dataclass(frozen=True, kw_only=True)
class PAnnealConfig(DictionaryConfig):
    """`dictionary_learning/p_anneal`: ReLU with ‖f‖_p, p falling from 1 (Karvonen et al. 2024); the penalty is rescaled at each step of p."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.p_anneal:PAnnealTrainer"
    word: ClassVar[str] = "relu"
    own: ClassVar[tuple[str, ...]] = ("sparsity_function", "initial_sparsity_penalty", "p_start", "p_end", "n_sparsity_updates", "sparsity_queue_length")
    in_steps: ClassVar[tuple[str, ...]] = ("warmup_steps", "sparsity_warmup_steps", "decay_start", "anneal_start", "anneal_end")
    tensors: ClassVar[int] = 8

    sparsity_function: Literal["Lp", "Lp^p"] = "Lp^p"
    """`Lp^p`, or `Lp`, which is the library's default for p_anneal and fails with p_end 0."""
    initial_sparsity_penalty: float = 0.1
    """Weight of the sparsity term at first."""
    anneal_start: float | None = None
    """Step at which p starts to fall; below 1 a share of the run. None: 15000, at most half of the run."""
    anneal_end: float | None = None
    """Step at which it ends; below 1 a share of the run. None: the end of the run."""
    p_start: float = 1.0
    """p at first."""
    p_end: float = 0.0
    """p at the end of annealing; with the default end, the last value before it is the one that trains."""
    n_sparsity_updates: int = 10
    """Values of p, ends included."""
    sparsity_queue_length: int = 10
    """Steps over which the rescaling of the penalty is averaged."""
    sparsity_warmup_steps: float | None = None
    """Steps over which the penalty rises; below 1 a share of the run. None: 2000, at most a fifth of the run."""
    resample_steps: float | None = None
    """Refused: the library's resampling does nothing here, or fails."""

    resampling: ClassVar[str] = "the library's resampling for p_anneal assigns to copies and changes no weight"

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        yield from _not_negative(self, "initial_sparsity_penalty")
        if self.resample_steps is not None:
            yield f"resample_steps is refused: {self.resampling}; dictionary_learning/standard resamples"
        if not self.p_start > 0 or not 0 <= self.p_end <= self.p_start:
            yield f"p_start {self.p_start:g} and p_end {self.p_end:g}: p falls from above 0, and ends at 0 or above"
        if self.sparsity_queue_length < 1:
            yield f"sparsity_queue_length is {self.sparsity_queue_length}; it must be at least 1"
        steps = self.resolved(job)
        if any(not 0 <= (getattr(self, name) or 0) < job.steps for name in ("anneal_start", "anneal_end")):
            return
        start, end = steps.get("anneal_start", 0), steps.get("anneal_end", job.steps)
        if not 2 <= self.n_sparsity_updates <= max(2, end - start):
            yield f"n_sparsity_updates is {self.n_sparsity_updates}; it must be from 2 to the {max(0, end - start)} steps of annealing"
        elif end - start < 2:
            yield f"anneal_start is step {start}, anneal_end {end}; p needs at least two steps to fall"
        if self.sparsity_function == "Lp" and self.p_end == 0:
            yield "sparsity_function is 'Lp' with p_end 0: the library divides by p and fails near the end; p_end above 0, or Lp^p"
        elif self.p_end == 0 and end < job.steps:
            yield f"p_end is 0 from step {end} on: ‖f‖₀ has no gradient, so nothing would be sparse; p_end above 0, or no anneal_end"

    def cautions(self, job: Job) -> Iterator[str]:
        yield from super().cautions(job)
        if self.anneal_end is None:
            last = self.p_start + (self.p_end - self.p_start) * (self.n_sparsity_updates - 2) / (self.n_sparsity_updates - 1)
            yield f"the library excludes the end of annealing: the last p that trains is {last:.3g}, not {self.p_end:g}"
        if self.sparsity_function == "Lp^p":
            yield "the library's own default is sparsity_function Lp, which divides by p and fails when p reaches 0"


@dataclass(frozen=True, kw_only=True)
class GatedAnnealConfig(PAnnealConfig):
    """`dictionary_learning/gated_anneal`: gated, with p-annealing of the gate's norm."""

    trainer: ClassVar[str] = "dictionary_learning.trainers.gated_anneal:GatedAnnealTrainer"
    word: ClassVar[str] = "gated"
    tensors: ClassVar[int] = 11
    resampling: ClassVar[str] = "the library's resampling for gated_anneal fails (it looks for a bias that a gated encoder lacks)"


def _not_negative(config: Any, *names: str) -> Iterator[str]:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            yield f"{name} is {getattr(config, name):g}; it must be at least 0"
