"""A selection and the float32 numbers that it was made from in; the rows in which a latent was passed over, by float64, out."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-24
"""u of float32."""
LATENTS = 4096
"""Latents a product in float64, so that no float64 copy of all weights exists."""


def missed_rows(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    values_BK: Tensor,
    indices_BK: Tensor,
    k: int,
    rule: str = "top",
    cut: float = 0.0,
) -> Tensor:
    """bool [B]: rows in which a selected latent lies below the bar, or an unselected one above it, by more than 8u (|x| |w_f| + |b_f|), in float64.

    The bar is the row's k-th largest pre-activation (`top`), or absolute value (`abs`); the largest of each of k groups (`group`); or `cut`
    (`batch`). What is not positive need not be selected.
    """
    x = x_BD.double()
    parts, scales = [], []
    for start in range(0, W_enc_FD.shape[0], LATENTS):
        W = W_enc_FD[start : start + LATENTS].double()
        b = b_enc_F[start : start + LATENTS].double()
        parts.append(x @ W.T + b)
        scales.append(x.norm(dim=1, keepdim=True) * W.norm(dim=1) + b.abs())
    exact_BF, slack_BF = torch.cat(parts, 1), torch.cat(scales, 1) * (8 * UNIT)
    exact_BF = exact_BF.abs() if rule == "abs" else exact_BF
    if rule == "batch":
        bar_BF = torch.full_like(exact_BF[:, :1], cut)
    elif rule == "group":
        groups_BKG = exact_BF.view(len(x), k, -1)
        bar_BF = groups_BKG.amax(2, keepdim=True).expand_as(groups_BKG).reshape_as(exact_BF)
    else:
        bar_BF = exact_BF.topk(min(k, exact_BF.shape[1]), dim=1).values[:, -1:]
    bar_BF = bar_BF.clamp_min(0)
    selected_BF = torch.zeros_like(exact_BF, dtype=torch.bool)
    active_BK = values_BK != 0
    rows_BK = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand_as(indices_BK)
    selected_BF[rows_BK[active_BK], indices_BK[active_BK]] = True
    below = selected_BF & (exact_BF < bar_BF - slack_BF)
    above = ~selected_BF & (exact_BF > bar_BF + slack_BF)
    return (below | above).any(1)
