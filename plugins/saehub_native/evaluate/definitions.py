"""A definition's id in, its formula in words out: what every number of `native/core` means. Torch-free, for reports.

The same id always means the same formula; a change of formula is a new id (`/2`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saehub.errors import UsageError, did_you_mean

ROWS = "Rows are the kept rows of the dataset: BOS, padding and whatever the recipe excludes are no rows."
COUNTED = (
    "Counted are the positions whose own token and next token are both kept rows, the next one not being BOS. Interventions replace kept rows "
    "alone; excluded positions keep their original activation, under ablation too (elsewhere zeros often stand at BOS as well: another baseline)."
)
ERROR = (
    "Totals over rows divided by totals over rows; the standard error is over sequences, linearised: "
    "sqrt(S/(S-1) Σ_j (A_j - R B_j)²) / |Σ_j B_j|; the interval is ± 1.96 of it."
)
PCA = (
    "x̂ = μ + V_k V_kᵀ (x - μ), principal directions of the first dataset (in_sample where there is one), fitted on its even and its odd sequences: "
    "rows of that dataset get the other half's fit, rows of other datasets the fit on both. k is the SAE's own, or else its mean L0 on that dataset."
)
RANDOM = (
    "As many random unit directions as the SAE has latents; each row takes the k with the greatest projections of x - μ (μ: mean of the first dataset) "
    "and is projected onto their span: the best coefficients that any decoder could have for them."
)


IDENTITY = (
    "x̂ = x, in the model's own dtype: no dictionary at all. FVU is 0 and everything is recovered where rows are put back in their place; what is "
    "missing from that is lost by the splice, not by an SAE."
)


@dataclass(frozen=True)
class Definition:
    """One metric's meaning."""

    id: str
    """`saehub.fvu/1`."""
    metric: str
    """Its name in a Measurement."""
    title: str
    """A few words for a table."""
    text: str
    """The formula."""
    better: Literal["higher", "lower", "none"] = "none"
    unit: str = ""
    """`nats`, or empty for a pure number."""


def _define(metric: str, title: str, text: str, better: Literal["higher", "lower", "none"] = "none", unit: str = "") -> Definition:
    return Definition(f"saehub.{metric}/1", metric, title, text, better, unit)


_PLAIN = (
    _define(
        "fvu",
        "fraction of variance unexplained",
        f"Σ‖y-ŷ‖² / Σ‖y-ȳ‖², ȳ the mean of this dataset's rows, sums over all of them (no average over batches). y is the row that the SAE should "
        f"give: its input, or a transcoder's target. The mean scores 1, a perfect SAE 0. {ROWS} {ERROR}",
        "lower",
    ),
    _define(
        "explained_variance",
        "explained variance",
        "1 - Σ‖e-ē‖² / Σ‖y-ȳ‖² with e = y-ŷ: like 1 - FVU, but a constant error ē is forgiven (1 - FVU is R², which other tools also call explained "
        f"variance). Never below 1 - FVU. {ERROR}",
        "higher",
    ),
    _define("mse", "mean squared error", f"Σ‖y-ŷ‖² / (rows · d): per row and coordinate, in raw units of the activations. {ERROR}", "lower"),
    _define("cosine", "cosine of reconstruction", f"Mean over rows of cos(y, ŷ), about the origin; 0 where either vector is zero. {ERROR}", "higher"),
    _define("l0", "active latents a row", f"Mean over rows of the number of latents that are not 0. {ERROR}"),
    _define(
        "l1", "L1 norm of the latents", f"Mean over rows of Σ_i |f_i|, as encoded; it changes when decoder rows are rescaled and latents with them. {ERROR}"
    ),
    _define(
        "ce_recovered_zero",
        "CE recovered (zero-ablation)",
        f"(CE_zero - CE_spliced) / (CE_zero - CE_clean), not clipped: 1 is the unchanged model, 0 is zeros in place of y. {COUNTED} {ERROR}",
        "higher",
    ),
    _define(
        "ce_recovered_mean",
        "CE recovered (mean-ablation)",
        f"(CE_mean - CE_spliced) / (CE_mean - CE_clean), not clipped; the mean is that of this dataset's rows, so that the predictor with FVU 1 scores 0. "
        f"{COUNTED} {ERROR}",
        "higher",
    ),
    _define("kl_recovered_zero", "KL recovered (zero-ablation)", f"1 - KL_spliced / KL_zero. {COUNTED} {ERROR}", "higher"),
    _define("kl_recovered_mean", "KL recovered (mean-ablation)", f"1 - KL_spliced / KL_mean. {COUNTED} {ERROR}", "higher"),
    _define("ce_clean", "cross-entropy, unchanged model", f"Mean of -log p(next token). {COUNTED} {ERROR}", "none", "nats"),
    _define("ce_spliced", "cross-entropy with the SAE", f"The same with ŷ in place of y at the SAE's (target) site. {COUNTED} {ERROR}", "lower", "nats"),
    _define("ce_zero", "cross-entropy, zero-ablation", f"The same with zeros in place of y. {COUNTED} {ERROR}", "none", "nats"),
    _define("ce_mean", "cross-entropy, mean-ablation", f"The same with ȳ, the mean of this dataset's rows, in place of y. {COUNTED} {ERROR}", "none", "nats"),
    _define("kl_spliced", "KL with the SAE", f"Mean of KL(clean ‖ with ŷ) between next-token distributions. {COUNTED} {ERROR}", "lower", "nats"),
    _define("kl_zero", "KL, zero-ablation", f"Mean of KL(clean ‖ zeros in place of y). {COUNTED} {ERROR}", "none", "nats"),
    _define("kl_mean", "KL, mean-ablation", f"Mean of KL(clean ‖ ȳ in place of y). {COUNTED} {ERROR}", "none", "nats"),
    _define(
        "dead_share",
        "dead latents",
        "Share of latents that never fired, given only where that silence proves a rate of at most r0 with 95 % confidence: 3/N ≤ r0 over N effective "
        "tokens (or where every latent fired, and it is 0); otherwise undecided. N counts bursts, not rows: N = -ln(0.05) n/x with mean_i exp(-x/m_i) = "
        "0.05, m_i the firings per sequence of the rare latents that did fire (in at most 5 % of the sequences). A latent that fired once is not dead, "
        "however rare: see feature_density. r0 is dead_rate of the recipe, 1e-5 by default, or stands in the metric's name. The standard error is the "
        "jackknife over sequences.",
        "lower",
    ),
    _define(
        "never_fired_share",
        "latents that never fired here",
        "Share of latents that were 0 on every row of this dataset: a fact about these rows, which falls as more are seen. The standard error is the "
        "jackknife over sequences.",
    ),
    _define(
        "feature_density",
        "mean firing rate of a latent",
        f"Mean over latents of the share of rows on which they fire (= L0 / width); the parts hold the histogram of log10 of the rates. {ERROR}",
    ),
)
_BASES = {"fvu": "FVU", "ce_recovered_zero": "CE recovered (zero-ablation)", "ce_recovered_mean": "CE recovered (mean-ablation)"}
_BASELINES = tuple(
    _define(f"{metric}_{name}", f"{title} of {words}", f"saehub.{metric}/1 of a baseline beside the SAE. {text}")
    for name, words, text in (("pca", "PCA, same k", PCA), ("random", "a random dictionary", RANDOM), ("identity", "the identity", IDENTITY))
    for metric, title in _BASES.items()
)

DEFINITIONS: dict[str, Definition] = {
    entry.id: entry for plain in _PLAIN for entry in (plain, *(beside for beside in _BASELINES if beside.metric.rpartition("_")[0] == plain.metric))
}
"""Definition id -> Definition, in the order of the table: a baseline stands after the metric that it is a baseline of."""
_BY_METRIC = {entry.metric: entry for entry in DEFINITIONS.values()}


def definition(id: str) -> Definition:
    """The definition `id`; UsageError with a did-you-mean where native/core has none of that id."""
    if id not in DEFINITIONS:
        raise UsageError(f"native/core has no definition {id!r}{did_you_mean(id, DEFINITIONS)}", fix=f"ids: {', '.join(DEFINITIONS)}")
    return DEFINITIONS[id]


def of_metric(metric: str) -> Definition:
    """The definition of a metric's name; what follows an `@` is a parameter (`dead_share@1e-04`)."""
    return _BY_METRIC[metric.partition("@")[0]]
