"""A definition's id in, its formula in words out: what every number of `native/paraphrase` and `native/drift` means. Torch-free, for reports."""

from __future__ import annotations

from typing import Literal

from saehub_native.evaluate.definitions import Definition

SETS = "A(t): the latents that fire on at least one token of text t, BOS aside. Jaccard: |A ∩ B| / |A ∪ B|; texts on which nothing fires are left out."
TEXTS = "The standard error is over texts."


def _define(metric: str, title: str, text: str, better: Literal["higher", "lower", "none"] = "none") -> Definition:
    return Definition(f"saehub.{metric}/1", metric, title, text, better)


_ALL = (
    _define(
        "paraphrase_overlap",
        "latents kept when a text is put differently",
        f"Mean over texts of the Jaccard overlap of A(text) and A(the same text, perturbed as the metric's name says). {SETS} Texts that the perturbation "
        f"leaves as they are do not count. `pairs`: the user's own pairs. Read it beside the null. {TEXTS}",
        "higher",
    ),
    _define("paraphrase_overlap_null", "… against another text", f"The same, of A(text) and A(another text of the set, perturbed). {SETS} {TEXTS}"),
    _define(
        "drift_overlap_model",
        "latents kept in the other model",
        "Mean over tokens of the Jaccard overlap of the latents that fire on the same token in the two models, tokens on which none fires left out. The "
        "standard error is over sequences.",
        "higher",
    ),
    _define("drift_fvu", "FVU on the rows of the model itself", "saehub.fvu/1 on the same sequences as in the other model.", "lower"),
    _define("drift_fvu_model", "FVU in the other model", "saehub.fvu/1 of the same site of the other model, on the same tokens.", "lower"),
    _define("drift_l0", "L0 in the model itself", "saehub.l0/1 on the same sequences as in the other model."),
    _define("drift_l0_model", "L0 in the other model", "saehub.l0/1 of the same site of the other model, on the same tokens."),
    _define(
        "drift_rate_correlation",
        "firing rates as in the first dataset",
        "Spearman correlation over latents of the firing rate on this dataset with that on the first one, latents that are silent on both left out. The "
        "standard error is the delete-one-group jackknife over ten groups of this dataset's sequences.",
        "higher",
    ),
    _define(
        "drift_rate_correlation_null",
        "… of two halves of the first dataset",
        "The same between the even and the odd sequences of the first dataset: what no drift looks like at half the budget. Error likewise.",
    ),
)
DEFINITIONS: dict[str, Definition] = {entry.id: entry for entry in _ALL}
"""Definition id -> Definition, in the order of the table."""
BY_METRIC = {entry.metric: entry for entry in _ALL}
