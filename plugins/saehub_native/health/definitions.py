"""A definition's id in, its formula in words out: what every number of `native/health` means. Torch-free, for reports."""

from __future__ import annotations

from saehub_native.evaluate.definitions import DEFINITIONS as CORE
from saehub_native.evaluate.definitions import ERROR, ROWS, Definition, _define

LATENTS = "The standard error is the standard deviation over latents divided by √F."
GROUPS = "The standard error is a delete-one-group jackknife over ten groups of sequences."

_OWN = (
    _define(
        "expansion",
        "latents per dimension",
        "F / d_in, from the shapes. Below 1 the dictionary is undercomplete: it has fewer directions than the space, and cannot be the "
        "overcomplete basis that sparse coding asks for.",
    ),
    _define("finite_weights", "finite weights", "Share of the numbers in all tensors that are neither NaN nor infinite.", "higher"),
    _define(
        "redundancy",
        "redundancy",
        "Mean over latents i of max_{j≠i} cos(d_i, d_j), d_i the decoder row of latent i; signed, dead latents included. A zero row counts 0. "
        f"Compare it with redundancy_null only: it grows with F and falls with d. {LATENTS}",
        "lower",
    ),
    _define(
        "redundancy_null",
        "redundancy of random directions",
        "Expected redundancy of F independent directions, uniform on the sphere of R^d: E max of F-1 independent cosines of density "
        "∝ (1-c²)^((d-3)/2), integrated numerically. The standard error is an upper bound for one random dictionary, √(2/F) times the "
        "standard deviation of one maximum (a pair may be the closest one of both its members).",
    ),
    _define(
        "duplicate_share",
        "near-duplicate latents",
        "Share of latents whose decoder row has a cosine of at least duplicate_cosine with another one's; the parts hold the number of such "
        f"pairs, the sizes of their connected clusters and the closest pairs. {LATENTS}",
        "lower",
    ),
    _define(
        "encoder_decoder_cosine",
        "encoder–decoder cosine",
        "Mean over latents of cos(encoder column i, decoder row i); autoencoders only, for a transcoder reads one space and writes another. "
        f"A zero vector counts 0. {LATENTS}",
    ),
    _define(
        "finite_share",
        "finite rows",
        f"Share of rows with finite numbers throughout: input, latents and reconstruction. {ROWS} {ERROR}",
        "higher",
    ),
    _define("activation_norm", "norm of the rows", f"Mean over rows of ‖x‖, in raw units of the activations. {ROWS} {ERROR}"),
    _define(
        "norm_ratio",
        "norm of the reconstruction",
        f"Mean over rows of ‖ŷ‖ / ‖y‖ (rows with y = 0 left out): 1 is the right scale, below 1 shrinkage. {ROWS} {ERROR}",
    ),
    _define("l0_share", "share of latents active on a row", f"L0 / F. Above 0.1 the code is not sparse. {ROWS} {ERROR}"),
    _define("dense_share", "dense latents", f"Share of latents that fire on more than dense_rate of the rows. {GROUPS}"),
    _define(
        "cofiring",
        "co-firing with the nearest latent",
        "Mean over latents that fired of the Jaccard index |A_i ∩ A_n| / |A_i ∪ A_n| of the rows on which latent i and its nearest decoder "
        f"neighbour n fire. Near 1, pairs say the same thing twice. {GROUPS}",
    ),
    _define(
        "dead_share_library",
        "dead by the training library's own rule",
        "Share of latents that did not fire in the last W rows, W being the trainer's own window as the checkpoint records it (else 10 million "
        "rows, the default of several libraries). Given only where the dataset has W rows: with fewer, the rule cannot be applied.",
        "lower",
    ),
    _define(
        "waking_share",
        "latents still waking up",
        "Share of latents whose first firing lies in the second half of the rows: how much the count of silent latents was still falling when the "
        "data ended. The parts hold the whole curve: rows read, share silent so far, 3/N (the 95 % bound on a silent latent's rate). The standard "
        "error is binomial over latents.",
    ),
    _define(
        "out_minus_in",
        "out of sample minus in sample",
        "The metric after the @ on this dataset minus the same metric on in_sample (else the first dataset); the standard errors add in squares, "
        "for the two texts are independent.",
    ),
)

DEFINITIONS: dict[str, Definition] = {entry.id: entry for entry in (*_OWN, CORE["saehub.dead_share/1"])}
"""Definition id -> Definition; `dead_share` is native/core's."""
BY_METRIC = {entry.metric: entry for entry in DEFINITIONS.values()}


def of_metric(metric: str) -> Definition:
    """The definition of a metric's name; what follows an `@` is a parameter."""
    return BY_METRIC[metric.partition("@")[0]]
