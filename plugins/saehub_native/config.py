"""The `with:` of a recipe in, checked settings of the native trainers out; imports no torch, so that a plan can ask everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from saehub.api import Job

# Both measured: LR_SHORT by tests/benchmarks/topk_quality.py (the best rate fell as 1/√steps between 200 and 4,000 steps, on planted and on real
# rows), LR_LONG by Gao et al. (2024, fig. 3) on long runs, as 2e-4 at 2^14 latents. Largest rates by tests/benchmarks/architectures_quality.py.
LR_SHORT, LR_LONG = 8.0, 0.0256
DEAD_ROWS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every native trainer takes, whatever the architecture."""

    objective: ClassVar[str] = ""
    """`"package.module:Class"`: the `saehub_native.architectures.Architecture` that is trained."""
    LR_MAX: ClassVar[float] = 0.0125
    """The most that the rule for the learning rate gives; it counts in runs of a few hundred steps."""

    expansion: float | None = None
    """Latents per input dimension: d_sae = round(expansion · d_in). None: 8, unless `width` is given."""
    width: int | None = None
    """Number of latents (d_sae), instead of `expansion`."""
    batch: int = 1024
    """Rows a step."""
    optimizer: Literal["adam", "muon", "schedule_free"] = "adam"
    """`adam`; `muon`: torch's, for matrices; `schedule_free`: Adam that averages instead of decaying (`pip install 'saehub[schedule-free]'`)."""
    lr: float | None = None
    """Peak learning rate. None: a rule, proportional to 1/√d_sae (`peak_lr`)."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    decay: float = 0.3
    """Share of the steps, at the end, over which it falls linearly to zero (not with `schedule_free`)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment."""
    adam_bits: Literal[32, 8] = 32
    """Bits a number of Adam's moments of matrices: 8 takes a quarter of their memory, and less time on a GPU (more on a CPU)."""
    clip: float | None = 1.0
    """Largest L2 norm of the whole gradient (of a loss in units of FVU); None: no clipping."""
    equalize: float = 0.0
    """Exponent e of FVU^−e, which a batch's gradient is multiplied by after clipping, so that Adam's steps do not shrink as the error does."""
    calibration: int = 8192
    """Calibration rows, never training rows, for b_dec, the first directions, the variance and thresholds: so many, or all there are."""
    init_blend: float | None = None
    """Share of a calibration row in a latent's first direction; the rest is random. 0: random only. None: 0.5, or 0 with `freeze_decoder`."""
    freeze_decoder: bool = False
    """A control: the decoder keeps its first, random directions, and everything else learns (Korznikov et al. 2026, arXiv 2602.14111)."""
    skip: bool = False
    """Of a transcoder: add a linear path x W_skipᵀ beside the latents."""
    dead_after: int | None = None
    """Rows without firing after which a latent counts as dead. None: `dead_rows` scales it to the run."""
    revive: float = 3e-4
    """Weight of the push on the biases of dead latents, which reaches those that no row activates; 0 turns it off."""
    resample: int = 0
    """How many times, evenly over the first half of the run, dead latents are drawn anew from rows that are reconstructed badly."""

    @property
    def last_decay(self) -> float:
        """`decay`, where the optimizer has one."""
        return 0.0 if self.optimizer == "schedule_free" else self.decay

    @property
    def blend(self) -> float:
        """`init_blend`, or its rule."""
        return (0.0 if self.freeze_decoder else 0.5) if self.init_blend is None else self.init_blend

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that keep their first values."""
        return ("W_dec",) if self.freeze_decoder else ()

    def resampling_steps(self, job: Job) -> list[int]:
        """Steps after which dead latents are drawn anew."""
        return [round((n + 1) * job.steps / (2 * self.resample)) for n in range(self.resample)]

    def architecture(self) -> str:
        """The word in `saehub.json`."""
        raise NotImplementedError(f"{type(self).__name__} does not name its architecture")

    def d_sae(self, job: Job) -> int:
        """Number of latents."""
        return self.width if self.width is not None else max(1, round((8 if self.expansion is None else self.expansion) * job.d_in))

    def peak_lr(self, job: Job) -> float:
        """`lr`, or the rule: max(LR_SHORT / √(d_sae · steps), LR_LONG / √d_sae), at most LR_MAX."""
        if self.lr is not None:
            return self.lr
        latents, steps = self.d_sae(job), max(1, job.steps)
        return min(self.LR_MAX, max(LR_SHORT / math.sqrt(latents * steps), LR_LONG / math.sqrt(latents)))

    def dead_rows(self, job: Job) -> int:
        """`dead_after`, or 1/32 of the run: at least 8 batches, at most 10 million rows."""
        return self.dead_after if self.dead_after is not None else min(DEAD_ROWS, max(8 * self.batch, job.rows // 32))

    def memory(self, job: Job) -> int:
        """Bytes at the peak: parameters, Adam's two moments and scratch, gradients; pre-activations of a chunk; rows of a batch.

        The libraries' optimizers make temporary copies of everything that they update. 64 MiB are for the buffers of the product library and
        the allocator's slack, which differ between processors by tens of MiB.
        """
        latents = self.d_sae(job)
        parameters = latents * (job.d_in + job.d_out + 1) + job.d_out + (job.d_in * job.d_out if self.skip else 0)
        rows = 6 * self.batch * (job.d_in + job.d_out)
        copies = 5 if self.optimizer == "adam" else 9
        return 4 * (copies * parameters + rows) + (72 << 20) + 256 * latents

    def check(self, job: Job) -> Iterator[str]:
        """Problems with these settings for this job, each with its fix."""
        if self.expansion is not None and self.width is not None:
            yield f"expansion {self.expansion:g} and width {self.width} are both given; leave one out"
        if self.expansion is not None and not self.expansion > 0:
            yield f"expansion is {self.expansion:g}; it must be above 0"
        if self.width is not None and self.width < 1:
            yield f"width is {self.width}; it must be at least 1"
        if self.batch < 1:
            yield f"batch is {self.batch}; it must be at least 1"
        elif self.batch > job.rows or job.steps < 1:
            yield f"batch is {self.batch}, the run has {job.rows} rows: not one step; lower batch, or raise data.train.tokens"
        if self.lr is not None and not 0 < self.lr < math.inf:
            yield f"lr is {self.lr:g}; it must be above 0 (leave it out for the rule)"
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name} is {getattr(self, name):g}; it is a share of the steps, from 0 to 1"
        if self.warmup <= 1 and self.decay <= 1 and self.warmup + self.decay > 1:
            yield f"warmup {self.warmup:g} and decay {self.decay:g} overlap; together they may be at most 1"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas are {list(self.betas)}; both must lie in [0, 1)"
        if self.adam_bits != 32 and self.optimizer != "adam":
            yield f"adam_bits is {self.adam_bits}, but the optimizer is {self.optimizer}; leave one of them out"
        if self.clip is not None and not self.clip > 0:
            yield f"clip is {self.clip:g}; it must be above 0, or null for no clipping"
        if not 0 <= self.equalize <= 2:
            yield f"equalize is {self.equalize:g}; it is an exponent from 0 (off) to 2"
        if self.calibration < 1:
            yield f"calibration is {self.calibration}; at least one row is needed"
        if not 0 <= self.blend <= 1:
            yield f"init_blend is {self.blend:g}; it is a share, from 0 to 1"
        if self.freeze_decoder and self.resample:
            yield f"resample is {self.resample}, and would replace rows of a decoder that freeze_decoder keeps; leave one of the two out"
        if self.dead_after is not None and self.dead_after < 1:
            yield f"dead_after is {self.dead_after} rows; it must be at least 1"
        if self.revive < 0:
            yield f"revive is {self.revive:g}; it must be at least 0 (0 turns it off)"
        if self.resample < 0 or self.resample > max(0, job.steps // 2):
            yield f"resample is {self.resample}; it is a number of times, from 0 to half of the {job.steps} steps"
        if self.optimizer == "schedule_free" and find_spec("schedulefree") is None:
            yield "optimizer is schedule_free, which needs the library schedulefree: pip install 'saehub[schedule-free]'"
        if self.skip and job.target_site is None:
            yield "skip is a linear path from a transcoder's input to its target; name a target_site, or leave it out"
        if job.target_site is None and job.d_in != job.d_out:
            yield f"an autoencoder needs d_in = d_out, here {job.d_in} and {job.d_out}; name a target_site to train a transcoder"


@dataclass(frozen=True, kw_only=True)
class SparseConfig(TrainConfig):
    """What the architectures that select about k latents a row take."""

    EXAMPLE: ClassVar[dict] = {"k": 4, "width": 96, "batch": 256}

    k: int
    """Latents a row: L0 is at most k (of the batchtopk family: k on average)."""
    k_anneal: float = 0.0
    """Share of the steps over which k falls linearly from `k_start`; 0: it is k from the first step."""
    k_start: int | None = None
    """The first k of `k_anneal`. None: 4 k, within the dictionary."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss, which revives dead latents; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents a row in the AuxK loss. None: d_in / 2."""
    equalize: float = 0.5
    """As of every native trainer; with 0.5 the gradient of Σ|e|² keeps its size while the error falls."""

    def first_k(self, job: Job) -> int:
        """Where k begins."""
        if not self.k_anneal:
            return self.k
        return min(self.d_sae(job), 4 * self.k) if self.k_start is None else self.k_start

    def aux_latents(self, job: Job) -> int:
        """`k_aux`, or d_in / 2 (Gao et al. 2024, §B.1), within the dictionary."""
        return min(self.d_sae(job), self.k_aux if self.k_aux is not None else max(1, job.d_in // 2))

    def memory(self, job: Job) -> int:
        """As every native trainer, and AuxK with all latents dead (weights, gradients, chunks of scores, its pairs in three orders, residual and gradient)."""
        latents, pairs = self.d_sae(job), self.batch * self.aux_latents(job)
        auxk = 8 * latents * (job.d_in + job.d_out) + 4 * (32 << 20) + 32 * pairs + 8 * self.batch * job.d_out if self.auxk_alpha > 0 else 0
        return super().memory(job) + auxk + 6 * 8 * self.batch * max(self.k, self.first_k(job))

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        latents = self.d_sae(job)
        if self.k < 1:
            yield f"k is {self.k}; it must be at least 1"
        elif self.k > latents >= 1:
            yield f"k is {self.k}, the dictionary has {latents} latents; lower k, or raise expansion"
        if not 0 <= self.k_anneal <= 1:
            yield f"k_anneal is {self.k_anneal:g}; it is a share of the steps, from 0 to 1"
        if self.k_start is not None and not (self.k_anneal and self.k <= self.k_start <= max(1, latents)):
            yield f"k_start is {self.k_start}; it needs k_anneal, and must lie between k ({self.k}) and the {latents} latents"
        if self.auxk_alpha < 0:
            yield f"auxk_alpha is {self.auxk_alpha:g}; it must be at least 0 (0 turns AuxK off)"
        if self.k_aux is not None and not 1 <= self.k_aux <= max(1, latents):
            yield f"k_aux is {self.k_aux}; it must lie between 1 and the {latents} latents"


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SparseConfig):
    """`native/topk`: the k largest pre-activations of each row (Gao et al. 2024, arXiv 2406.04093)."""

    objective: ClassVar[str] = "saehub_native.architectures.topk:TopK"
    LR_MAX: ClassVar[float] = 0.02

    def architecture(self) -> str:
        return "topk"


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(SparseConfig):
    """`native/abstopk`: the k pre-activations of each row that are largest by absolute value, signs kept."""

    objective: ClassVar[str] = "saehub_native.architectures.abstopk:AbsTopK"

    equalize: float = 0.75
    """As of every native trainer; here more of it pays."""
    revive: float = 1e-2
    """As of every native trainer; more of it, since more latents of this one die."""

    def architecture(self) -> str:
        return "abstopk"


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig(SparseConfig):
    """`native/groupmax`: the largest pre-activation of each of k groups of latents."""

    objective: ClassVar[str] = "saehub_native.architectures.groupmax:GroupMax"

    def architecture(self) -> str:
        return "groupmax"

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        latents = self.d_sae(job)
        if 1 <= self.k <= latents and latents % self.k:
            yield f"k is {self.k}, which does not divide the {latents} latents into groups; a width of {latents // self.k * self.k} would do"
        if self.k_anneal:
            yield f"k_anneal is {self.k_anneal:g}, but the k groups of groupmax are fixed; leave it out"


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(SparseConfig):
    """`native/batchtopk`: the k·B largest pre-activations of a batch of B rows (Bussmann et al. 2024, arXiv 2412.06410)."""

    objective: ClassVar[str] = "saehub_native.architectures.batchtopk:BatchTopK"
    LR_MAX: ClassVar[float] = 0.02

    auxk_alpha: float = 1 / 8
    """As of every architecture with k; here fewer die with more of it, at no loss."""

    def architecture(self) -> str:
        return "batchtopk"

    def memory(self, job: Job) -> int:
        """As `SparseConfig`, with rows four times as full as the average (values, order and masks)."""
        return super().memory(job) + 4 * 6 * 8 * self.batch * max(self.k, self.first_k(job))


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """`native/matryoshka_batchtopk`: BatchTopK whose prefixes of latents reconstruct by themselves (Bussmann et al. 2025, arXiv 2503.17547)."""

    objective: ClassVar[str] = "saehub_native.architectures.matryoshka:Matryoshka"
    LR_MAX: ClassVar[float] = 0.0125

    revive: float = 1e-2
    """As of every native trainer; here it pays to revive more."""
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Ends of the prefixes, ascending, as shares of the latents; the last one is 1."""

    def architecture(self) -> str:
        return "matryoshka"

    def prefix_ends(self, job: Job) -> list[int]:
        """Latents in each prefix."""
        return [max(1, round(share * self.d_sae(job))) for share in self.prefixes]

    def memory(self, job: Job) -> int:
        """As `BatchTopKConfig`, with one gradient of the reconstruction a prefix, and weight gradients joined from parts."""
        return super().memory(job) + 4 * (len(self.prefixes) * self.batch * job.d_out + self.d_sae(job) * (job.d_in + job.d_out))

    def check(self, job: Job) -> Iterator[str]:
        yield from super().check(job)
        if not self.prefixes or self.prefixes[-1] != 1 or not all(0 < share <= 1 for share in self.prefixes):
            yield f"prefixes are {list(self.prefixes)}; they are shares of the latents, and the last one is 1"
            return
        ends = self.prefix_ends(job)
        if any(left >= right for left, right in zip(ends, ends[1:], strict=False)):
            yield f"prefixes {list(self.prefixes)} end at latents {ends}; each must hold more than the one before"
