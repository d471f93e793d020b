"""What source and target computed on the same rows in; differences of supports, features and reconstructions, and what amounts to a problem, out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.checkpoint.certificate import FROBENIUS, PER_ROW, ROUNDOFFS, UNIT_ROUNDOFF

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE

Run = tuple[Tensor, Tensor]
"""Features [N, d_sae] and reconstruction [N, d_out]."""


@dataclass(frozen=True)
class Comparison:
    """The numbers of a certificate, and what is wrong with them."""

    values: dict[str, Any]
    """Fields of `Certificate`."""
    problems: tuple[str, ...]
    """Empty: one dictionary, as far as these rows can tell."""


def compare(source: SAE, target: SAE, source_run: Run, target_run: Run, x_ND: Tensor) -> Comparison:
    """Compare two runs on x_ND [N, d_in], or on sequences [S, T, d_in] of SAEs that need them whole. `source` and `target` are the SAEs as read, which explain differences near a boundary."""
    rows = x_ND.shape[:-1].numel()
    shape, out = (rows, source.config.d_sae), (rows, source.config.d_out)
    if not source.row_wise:
        source_run, target_run = (tuple(part.flatten(0, -2) for part in run) for run in (source_run, target_run))
    for side, (acts, recon) in (("source", source_run), ("target", target_run)):
        if tuple(acts.shape) != shape or tuple(recon.shape) != out:
            what = f"the {side} gave features {list(acts.shape)} and a reconstruction {list(recon.shape)}"
            return Comparison({}, (f"{what}, expected {list(shape)} and {list(out)}",))
        if not bool(acts.isfinite().all()) or not bool(recon.isfinite().all()):
            return Comparison({}, (f"the {side} computed NaN or infinity",))
    (f_NF, y_ND), (f2_NF, y2_ND) = source_run, target_run
    active_NF = f_NF != 0
    different_NF = active_NF != (f2_NF != 0)
    equal_N = ~different_NF.any(1)
    different = int(different_NF.sum())
    explained = _explained(source, target, different_NF, x_ND)
    frobenius, worst_row = _relative(y_ND[equal_N], y2_ND[equal_N])
    comparable_N = equal_N & active_NF.any(1)
    gap_N = (f_NF[comparable_N] - f2_NF[comparable_N]).abs().amax(1) / f_NF[comparable_N].abs().amax(1)
    worst_feature = float(gap_N.max()) if gap_N.numel() else 0.0
    values = {
        "rows": shape[0],
        "active_share": float(active_NF.any(1).double().mean()),
        "mean_l0": float(active_NF.sum(1).double().mean()),
        "latents_exercised": float(active_NF.any(0).double().mean()),
        "support": {"rows_equal": int(equal_N.sum()), "different": different, "explained": explained, "unexplained": different - explained},
        "reconstruction": {"frobenius": frobenius, "worst_row": worst_row},
        "features": {"worst_row": worst_feature},
    }
    problems = []
    if different > explained:
        problems.append(f"{different - explained} active latents differ without being near their boundary")
    if not bool(equal_N.any()):
        problems.append("no row has the same active latents on both sides")
    if frobenius > FROBENIUS or worst_row > PER_ROW:
        problems.append(
            f"reconstructions differ by {frobenius:.1e} (allowed {FROBENIUS:.0e}), {worst_row:.1e} in the worst row (allowed {PER_ROW:.0e})"
        )
    if worst_feature > PER_ROW:
        problems.append(f"features differ by {worst_feature:.1e} of the row's largest (allowed {PER_ROW:.0e})")
    return Comparison(values, tuple(problems))


def _relative(a_ND: Tensor, b_ND: Tensor) -> tuple[float, float]:
    """‖a - b‖_F/‖a‖_F and the largest ‖a_r - b_r‖/‖a_r‖, in float64."""
    if not a_ND.numel():
        return 0.0, 0.0
    a_ND, gap_ND = a_ND.double(), a_ND.double() - b_ND.double()
    rows_N = gap_ND.norm(dim=1) / a_ND.norm(dim=1).clamp(min=1e-30)
    return float(gap_ND.norm() / a_ND.norm().clamp(min=1e-30)), float(rows_N.max())


def _explained(source: SAE, target: SAE, different_NF: Tensor, x_ND: Tensor) -> int:
    """How many differing (row, latent) pairs lie within rounding of their boundary.

        margin_i ≤ 8 u (|x'| |W_i| + |b_i|)

    in float64, from the source's own tensors; the terms are the larger of the two sides' (folding a bias can make them larger), and
    where latents compete the rival's are added: both pre-activations were rounded. An exact tie has margin 0.
    """
    if not source.row_wise:
        return _explained_in_sequences(source, target, different_NF, x_ND)
    total = 0
    for row in different_NF.any(1).nonzero().squeeze(1).tolist():
        x_1D = x_ND[row : row + 1].double()
        p_1F = source.preacts(source.centre(x_1D))
        scale_1F = torch.maximum(source.rounding_scale(source.centre(x_1D)), target.rounding_scale(target.centre(x_1D)))
        rival = source.rival(p_1F)
        if rival is not None:
            scale_1F = scale_1F + scale_1F.gather(1, rival)
        near_1F = source.margin(p_1F) <= ROUNDOFFS * UNIT_ROUNDOFF * scale_1F
        total += int((near_1F & different_NF[row : row + 1]).sum())
    return total


def _explained_in_sequences(source: SAE, target: SAE, different_NF: Tensor, x_STD: Tensor) -> int:
    """The same for SAEs whose features depend on the whole sequence."""
    total, different_STF = 0, different_NF.reshape(*x_STD.shape[:2], -1)
    for sequence in different_STF.flatten(1).any(1).nonzero().squeeze(1).tolist():
        x_1TD = x_STD[sequence : sequence + 1].double()
        scale_1TF = torch.maximum(source.rounding_scale(source.centre(x_1TD)), target.rounding_scale(target.centre(x_1TD)))
        near_1TF = source.margin(source.preacts(source.centre(x_1TD))) <= ROUNDOFFS * UNIT_ROUNDOFF * scale_1TF
        total += int((near_1TF[0] & different_STF[sequence]).sum())
    return total
