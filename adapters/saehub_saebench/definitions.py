"""An evaluator and a metric in; what the number means, whether more is better, and the caveat that must stand beside it, out; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Definition:
    """What one metric of SAEBench means."""

    id: str
    """`saebench.<eval>.<metric>/1`, of SAEBench 0.6.0's formula."""
    title: str
    """A few words."""
    text: str
    """The formula, and where it is known to be off, how."""
    better: Better = "none"
    caveat: str | None = None
    """Shown with every value."""


def _group(evaluator: str, *entries: tuple) -> dict[str, Definition]:
    """{metric: Definition} of (metric, title, text[, better[, caveat]])."""
    return {name: Definition(f"saebench.{evaluator}.{name}/1", *rest) for name, *rest in entries}


ZEROED = "zeros stand at BOS too, which saehub's own cross-entropies leave as it is: another baseline than theirs"
_CORE = _group(
    "core",
    ("kl_div_score", "KL recovered (zero-ablation)", "1 - KL(clean ‖ SAE) / KL(clean ‖ zeros), as SAEBench computes it: log of a softmax, which underflows to NaN "
     "for confident models (published as -1).", "higher"),
    ("kl_div_with_ablation", "KL, zero-ablation", "Mean over positions of KL(clean ‖ zeros at the site, at every position).", "none", ZEROED),
    ("kl_div_with_sae", "KL with the SAE", "Mean over positions of KL(clean ‖ reconstruction at the site).", "lower"),
    ("kl_div_score_corrected", "KL recovered, corrected", "The same share from log-softmax, which does not underflow; on the same rows.", "higher"),
    ("ce_loss_score", "CE recovered (zero-ablation)", "(CE_zero - CE_sae) / (CE_zero - CE_clean).", "higher", ZEROED),
    ("ce_loss_with_ablation", "cross-entropy, zero-ablation", "Mean over positions, nats, with zeros at the site at every position.", "none", ZEROED),
    ("ce_loss_with_sae", "cross-entropy with the SAE", "Mean over positions, nats.", "lower"),
    ("ce_loss_without_sae", "cross-entropy, unchanged model", "Mean over positions, nats."),
    ("explained_variance", "explained variance (SAEBench 0.6)", "1 - mean‖x-x̂‖² / (mean‖x‖² - (mean x²)²): its total is no variance about the mean (about zero for "
     "small activations, less than that for large ones), so that predicting the mean does not score 0.", "higher",
     "its total is no variance about the mean; see explained_variance_corrected"),
    ("explained_variance_legacy", "explained variance (published)", "Mean over rows of 1 - ‖x-x̂‖²/‖x-x̄_batch‖²: what the paper and Neuronpedia show; it depends on "
     "the batch size.", "higher", "a mean of ratios, dependent on the batch size"),
    ("explained_variance_corrected", "explained variance, corrected", "1 - Σ‖x-x̂‖² / Σ‖x-x̄‖² over all rows, in float64 (1 - FVU of native/core).", "higher"),
    ("mse", "mean squared error (SAEBench)", "‖x-x̂‖² divided by the rows of a batch, averaged over rows: it scales with 1/batch size.", "lower",
     "scales with 1/batch size; see mse_corrected"),
    ("mse_corrected", "mean squared error, corrected", "Σ‖x-x̂‖² / (rows · d).", "lower"),
    ("cossim", "cosine of reconstruction", "Mean over rows of cos(x, x̂).", "higher"),
    ("l2_norm_in", "norm of the input", "Mean of ‖x‖."),
    ("l2_norm_out", "norm of the reconstruction", "Mean of ‖x̂‖."),
    ("l2_ratio", "norm ratio", "Mean of ‖x̂‖/‖x‖."),
    ("relative_reconstruction_bias", "relative reconstruction bias", "E‖x̂‖² / E[x·x̂] (Rajamanoharan et al. 2024, eq. 10)."),
    ("l0", "active latents a row", "Mean number of latents that are not 0."),
    ("l1", "sum of the latents", "Mean of Σ_i f_i, with unit decoder rows.", "none", "with decoder norms folded in"),
    ("frac_alive", "share of latents that fired", "Share of latents that fired on any row read: it grows with the rows.", "higher"),
    ("freq_over_1_percent", "share of latents above 1 %", "Share of latents that fire on more than 1 % of the rows."),
    ("freq_over_10_percent", "share of latents above 10 %", "Share of latents that fire on more than 10 % of the rows."),
    ("normalized_freq_over_1_percent", "firing mass above 1 %", "Share of all firings that is of latents above 1 %."),
    ("normalized_freq_over_10_percent", "firing mass above 10 %", "Share of all firings that is of latents above 10 %."),
    ("average_max_encoder_cosine_sim", "mean max. encoder cosine", "Mean over latents of the largest cosine with another encoder direction."),
    ("average_max_decoder_cosine_sim", "mean max. decoder cosine", "Mean over latents of the largest cosine with another decoder row."),
)  # fmt: skip

_META = _group(
    "meta_structure",
    ("decoder_fraction_variance_explained", "decoder variance explained by a meta-SAE", "1 - Σ‖W_i-Ŵ_i‖²/Σ‖W_i-W̄‖² of a BatchTopK SAE trained on the unit "
     "decoder rows, a quarter as wide: high where latents are made of shared parts.", "none"),
    ("final_reconstruction_mse", "meta-SAE mean squared error", "Mean squared error of the same, per coordinate."),
)  # fmt: skip

_TOP = "of a logistic probe on the k latents (after dividing by their mean when active) whose class means differ most, on held-out texts."
_PROBES = _group(
    "sae_probes",
    ("sae_top_k_test_accuracy", "accuracy of k latents", f"Accuracy {_TOP}", "higher"),
    ("sae_top_k_test_auc", "AUC of k latents", f"Area under the ROC curve {_TOP}", "higher"),
    ("sae_top_k_test_f1", "F1 of k latents", f"F1 {_TOP}", "higher"),
    ("llm_test_accuracy", "accuracy of the activations", "Accuracy of a logistic probe on the model's activations at the site: the ceiling without an SAE."),
    ("llm_test_auc", "AUC of the activations", "The same, area under the ROC curve."),
    ("llm_test_f1", "F1 of the activations", "The same, F1."),
)  # fmt: skip

_MEANED = "on features averaged over a text's tokens; mean over the classes of each dataset"
_SPARSE = _group(
    "sparse_probing",
    ("sae_test_accuracy", "accuracy of all latents", f"Test accuracy of a probe on all latents, {_MEANED}.", "higher",
     "SAEBench keeps the best epoch by test accuracy: biased upwards"),
    ("sae_top_k_test_accuracy", "accuracy of k latents", f"Test accuracy of a probe on the k latents whose class means differ most, {_MEANED}.", "higher"),
    ("llm_test_accuracy", "accuracy of the activations", f"Test accuracy of a probe on the activations, {_MEANED}.", "none",
     "SAEBench keeps the best epoch by test accuracy: biased upwards"),
    ("llm_top_k_test_accuracy", "accuracy of k channels", f"Test accuracy of a probe on k coordinates of the activations, {_MEANED}."),
)  # fmt: skip

CAUTION = 'arXiv 2605.18229: "TPP and SCR fail multiple lenses at their canonical settings and should not be used to evaluate SAEs"'
_SCR = _group(
    "scr",
    ("scr_metric", "spurious correlation removed", "(accuracy after zero-ablating n latents - before) / (clean - before) of a biased probe, in the direction whose "
     "accuracy is lower; not clipped, 0 where clean - before < 0.001.", "higher", CAUTION),
    ("scr_dir1", "… towards profession", "The same, ablating the gender probe's latents.", "higher", CAUTION),
    ("scr_dir2", "… towards gender", "The same, ablating the profession probe's latents.", "higher", CAUTION),
    ("scr_metric_corrected", "spurious correlation removed, padding left out", "scr_metric with padding left out of the mean over tokens.", "higher", CAUTION),
)  # fmt: skip
_TPP = _group(
    "tpp",
    ("tpp_total_metric", "targeted probe perturbation", "Mean over classes of (accuracy lost by the class's own probe - mean lost by the others') when its n latents "
     "are zero-ablated.", "higher", CAUTION),
    ("tpp_intended_diff_only", "… intended part", "Accuracy lost by the class's own probe.", "higher", CAUTION),
    ("tpp_unintended_diff_only", "… unintended part", "Accuracy lost by the other classes' probes.", "lower", CAUTION),
    ("tpp_total_metric_corrected", "targeted probe perturbation, padding left out", "tpp_total_metric with padding left out of the mean over tokens.", "higher",
     CAUTION),
)  # fmt: skip

_REDEFINED = "SAEBench >= 0.4 definition: not comparable with published (0.3.2) fractions"
_ABSORPTION = _group(
    "absorption",
    ("mean_absorption_fraction_score", "absorption, fraction", "Mean over letters of the share of a first-letter probe's projection that latents other than the "
     "letter's own carry, over words that its probe gets right.", "lower", _REDEFINED),
    ("mean_full_absorption_score", "absorption, full", "Mean over letters of the share of such words on which the letter's latents are silent and one other latent "
     "carries the projection.", "lower"),
    ("mean_num_split_features", "split features", "Mean over letters of the number of latents that together make up the letter (F1 jump above a threshold).", "lower"),
    ("std_dev_absorption_fraction_score", "spread over letters, fraction", "Standard deviation over letters.", "none", _REDEFINED),
    ("std_dev_full_absorption_score", "spread over letters, full", "Standard deviation over letters."),
    ("std_dev_num_split_features", "spread over letters, split features", "Standard deviation over letters."),
)  # fmt: skip

_RAVEL = _group(
    "ravel",
    ("disentanglement_score", "disentanglement", "Mean of cause and isolation (RAVEL, Huang et al. 2024).", "higher"),
    ("cause_score", "cause", "Share of prompts whose answer changes to the source entity's attribute when the attribute's latents are patched in.", "higher"),
    ("isolation_score", "isolation", "Share of prompts about other attributes whose answer stays.", "higher"),
)  # fmt: skip

_UNLEARNING = _group(
    "unlearning",
    ("unlearning_score", "unlearning", "1 - min accuracy on WMDP-bio over a sweep of clamped latents, of those settings that keep 99 % of MMLU, on questions that "
     "the model answers rightly in every order.", "higher", "0 where no setting keeps 99 %; see unlearning_settings_kept"),
    ("unlearning_settings_kept", "settings that keep MMLU", "Share of the sweep's settings that keep 99 % of the questions to be kept: those that the score is the best of."),
)  # fmt: skip

_AUTOINTERP = _group(
    "autointerp",
    ("autointerp_score", "judged interpretability", "Mean over latents of the share of examples that a judge, given the explanation of another, sorts right.", "higher",
     "null floor is the share of negatives (10/14 at the defaults); random windows where the latent fires count as negatives"),
    ("autointerp_std_dev", "spread over latents", "Standard deviation over latents."),
    ("autointerp_score_corrected", "judged interpretability, true labels", "The same answers, scored against what the latent really does on the random windows.",
     "higher"),
    ("autointerp_mislabelled", "mislabelled negatives", "Share of the random windows that count as negatives although the latent fires on them.", "lower"),
    ("autointerp_judged", "share of latents judged", "Latents whose answer could be read, of those asked for; SAEBench drops the others silently.", "higher"),
)  # fmt: skip

BY_EVALUATOR: dict[str, dict[str, Definition]] = {
    "core": _CORE,
    "meta_structure": _META,
    "sae_probes": _PROBES,
    "sparse_probing": _SPARSE,
    "scr": _SCR,
    "tpp": _TPP,
    "absorption": _ABSORPTION,
    "ravel": _RAVEL,
    "unlearning": _UNLEARNING,
    "autointerp": _AUTOINTERP,
}


def of_metric(evaluator: str, metric: str) -> Definition:
    """The definition of a metric's name; what follows an `@` is a parameter (`scr_dir1@10`)."""
    return BY_EVALUATOR[evaluator][metric.partition("@")[0]]


@lru_cache(maxsize=16)
def definitions(evaluator: str) -> Mapping[str, Definition]:
    """{id: Definition} of one evaluator, for reports; a caveat is part of the text there."""
    return {
        entry.id: replace(entry, text=f"{entry.text} Caution: {entry.caveat}." if entry.caveat else entry.text)
        for entry in BY_EVALUATOR[evaluator].values()
    }
