"""Rows and their reconstruction in, per-row quantities out; sums by sequence in, a ratio with its standard error out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from saehub_native.evaluate.accumulate import SequenceSums, float64

NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A number with its error, and the sums over each sequence that it came from."""

    value: float
    stderr: float | None
    n: int
    """Sequences with something in the denominator."""
    numerator_S: np.ndarray
    denominator_S: np.ndarray

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """value ± 1.96 stderr."""
        if self.stderr is None:
            return None, None
        return self.value - NORMAL_95 * self.stderr, self.value + NORMAL_95 * self.stderr


def ratio(numerator_S: np.ndarray, denominator_S: np.ndarray) -> Estimate:
    """Ratio of totals R = Σ_j A_j / Σ_j B_j over sequences j, with its linearised (delta-method) standard error.

        se = sqrt( S/(S-1) · Σ_j (A_j - R B_j)² ) / |Σ_j B_j|          Cochran, Sampling Techniques (1977), §6.4

    Sequences, not rows, are the units: rows of one text resemble each other. None for the error where S < 2; NaN where Σ B = 0.
    """
    total = float(denominator_S.sum())
    n = int((denominator_S != 0).sum())
    if total == 0 or n == 0:
        return Estimate(float("nan"), None, n, numerator_S, denominator_S)
    value = float(numerator_S.sum()) / total
    residual_S = numerator_S - value * denominator_S
    stderr = math.sqrt(n / (n - 1) * float(residual_S @ residual_S)) / abs(total) if n > 1 else None
    return Estimate(value, stderr, n, numerator_S, denominator_S)


def complement(estimate: Estimate) -> Estimate:
    """1 - R, with the numerators to match."""
    numerator_S = estimate.denominator_S - estimate.numerator_S
    return Estimate(1 - estimate.value, estimate.stderr, estimate.n, numerator_S, estimate.denominator_S)


def row_quantities(y_ND: Tensor, yhat_ND: Tensor, mean_D: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Per row, in float64: ‖y-ŷ‖², ‖y-ȳ‖² and cos(y, ŷ) (0 where either is the zero vector); and the errors y-ŷ [n, d]."""
    y_ND, yhat_ND = float64(y_ND), float64(yhat_ND)
    error_ND = y_ND - yhat_ND
    norms_N = y_ND.norm(dim=1) * yhat_ND.norm(dim=1)
    dots_N = (y_ND * yhat_ND).sum(1)
    found = {
        "rows": error_ND.new_ones(error_ND.shape[0]),
        "squared_error": error_ND.square().sum(1),
        "squared_total": (y_ND - mean_D.to(y_ND)).square().sum(1),
        "cosine": (dots_N / norms_N).masked_fill(norms_N == 0, 0.0),
    }
    return found, error_ND


def explained_variance(sums: SequenceSums) -> Estimate:
    """1 - Σ‖e-ē‖² / Σ‖y-ȳ‖², from Σ_j‖e‖² and the vector sums Σ_j e of each sequence j.

        Σ_j‖e-ē‖² = Σ_j‖e‖² - 2 ē·Σ_j e + n_j ‖ē‖²

    ē and ȳ minimise their sums of squares, so their own errors have no first-order effect on the ratio.
    """
    errors_SD = sums.vectors("error").astype(np.float64)
    rows_S = sums["rows"]
    mean_D = errors_SD.sum(0) / max(rows_S.sum(), 1)
    centred_S = sums["squared_error"] - 2 * errors_SD @ mean_D + rows_S * (mean_D @ mean_D)
    return complement(ratio(centred_S, sums["squared_total"]))


def log_histogram(rates_F: np.ndarray, bins: int) -> dict:
    """Counts of latents by log10 of their firing rate, in equal bins from -8 to 0; those that never fired are counted apart."""
    edges = np.linspace(-8.0, 0.0, bins + 1)
    fired = rates_F[rates_F > 0]
    counts, _ = np.histogram(np.clip(np.log10(fired), -8.0, 0.0), bins=edges)
    return {"log10_edges": edges.tolist(), "counts": counts.tolist(), "never_fired": int(len(rates_F) - len(fired)), "latents": len(rates_F)}
