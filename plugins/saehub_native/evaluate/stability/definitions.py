"""A definition's id in, its formula in words out: what every number of `native/stability` means. Torch-free, for reports."""

from __future__ import annotations

from typing import Literal

from saehub_native.evaluate.definitions import Definition

MATCHING = (
    "Matching: the one-to-one assignment with the greatest total cosine (Hungarian), of all latents of the narrower SAE; the note gives its certified gap."
)
ERROR = "The standard error is over latents; how another pair of seeds would come out is the spread over pairs."
RANDOM = "Two independent dictionaries of random unit directions of the same widths, encoder = decoder."
INIT = (
    "The same two SAEs before their first step: their trainers, settings, seeds and job names, with rows of the first dataset as calibration rows. "
    "Whatever they share was not learned."
)


def _define(metric: str, title: str, text: str, better: Literal["higher", "lower", "none"] = "none") -> Definition:
    return Definition(f"saehub.{metric}/1", metric, title, text, better)


_ALL = (
    _define(
        "shared_share",
        "latents shared by the two SAEs",
        "Share of latents whose partner is the same in the matching of encoders and in the matching of decoders, with a cosine above the threshold in both "
        f"(EleutherAI 2024, arXiv 2501.16615; 0.7 unless the metric's name says otherwise). {MATCHING} {ERROR}",
        "higher",
    ),
    _define("shared_share_random", "… of random dictionaries", f"saehub.shared_share/1 of a null. {RANDOM}"),
    _define("shared_share_init", "… before training", f"saehub.shared_share/1 of a null. {INIT}"),
    _define(
        "pw_mcc",
        "PW-MCC, signed",
        f"Mean cosine of decoder directions with their partners (pairwise mean correlation coefficient, arXiv 2505.20254, as its code has it). {MATCHING} {ERROR}",
        "higher",
    ),
    _define("pw_mcc_random", "… of random dictionaries", f"saehub.pw_mcc/1 of a null: it is not 0, and it grows with the width. {RANDOM}"),
    _define("pw_mcc_init", "… before training", f"saehub.pw_mcc/1 of a null. {INIT}"),
    _define(
        "pw_mcc_abs",
        "PW-MCC, absolute",
        f"Mean |cosine| of decoder directions with their partners under the matching with the greatest total |cosine| (as the paper has it). {MATCHING} {ERROR}",
        "higher",
    ),
    _define("pw_mcc_abs_random", "… of random dictionaries", f"saehub.pw_mcc_abs/1 of a null. {RANDOM}"),
    _define("pw_mcc_abs_init", "… before training", f"saehub.pw_mcc_abs/1 of a null. {INIT}"),
    _define("encoder_mcc", "mean cosine of matched encoders", f"As saehub.pw_mcc/1, of encoder directions. {MATCHING} {ERROR}", "higher"),
    _define(
        "index_agreement",
        "encoder and decoder name the same partner",
        f"Share of latents whose partner is the same in both matchings, at any cosine. {MATCHING} {ERROR}",
        "higher",
    ),
    _define("cosine_where_agreed", "decoder cosine where they do", f"Mean decoder cosine with the partner, over latents of index agreement. {ERROR}"),
    _define("cosine_where_not", "decoder cosine where they do not", f"Mean decoder cosine with the partner, over the other latents. {ERROR}"),
    _define(
        "pw_mcc_by_rate",
        "PW-MCC of latents that fire this often",
        "saehub.pw_mcc/1 of the first SAE's latents in one of equally large groups by their firing rate on the dataset, from rare (1) to frequent; `silent` "
        f"are those that never fired there. {ERROR}",
    ),
    _define("shared_share_by_rate", "latents shared, of those that fire this often", f"saehub.shared_share/1 of the same groups. {ERROR}"),
    _define(
        "subspace_overlap",
        "overlap of leading subspaces",
        "‖U_Aᵀ U_B‖² / r, U the r leading right singular vectors of the unit decoder rows: 1 where both span the same r dimensions, r/d (given beside it) for "
        "independent ones. Features may differ where the space they span does not.",
        "higher",
    ),
    _define("subspace_overlap_random", "… of random subspaces", "r/d, the expectation for independent random subspaces."),
    _define("assignment_gap", "certified gap of the matchings", "(bound - total) / total, the greatest of the matchings made: no one-to-one matching is better by more.", "lower"),
    _define(
        "found_nowhere_share",
        "latents that no other SAE has",
        "Share of latents of the first SAE that are shared (as in saehub.shared_share/1) with none of the others. The standard error is over latents.",
        "lower",
    ),
    _define("pw_mcc_over_pairs", "PW-MCC over all pairs", "Mean of saehub.pw_mcc/1 over pairs of SAEs, with the standard error over pairs (pairs share SAEs, so it is a guide).", "higher"),
    _define("shared_share_over_pairs", "shared latents over all pairs", "Mean of saehub.shared_share/1 over pairs, with the standard error over pairs (a guide).", "higher"),
)  # fmt: skip

DEFINITIONS: dict[str, Definition] = {entry.id: entry for entry in _ALL}
"""Definition id -> Definition, in the order of the table."""
BY_METRIC = {entry.metric: entry for entry in _ALL}
