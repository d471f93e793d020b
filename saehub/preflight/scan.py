"""A finished SAE and the model in; its FVU at the declared site and at the neighbouring ones, and whether another one fits clearly better, out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehub.activations import taps
from saehub.preflight import tensor
from saehub.preflight.checks import Check
from saehub.sites import Site

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE
    from saehub.data.model import ModelHandle

CLEARLY = 0.92
"""A site whose FVU is at most this share of the declared one's (or of 1, the mean's), by more than three standard errors, is the probable one."""


def fvu(sae: SAE, x_BTD: Tensor, keep_BT: Tensor) -> tuple[float, Tensor]:
    """FVU, Σ‖x - x̂‖² / Σ‖x - x̄‖² over the rows kept, and what each sequence adds to it [B]."""
    with torch.no_grad():
        xhat_BTD = sae(x_BTD) if not sae.row_wise else torch.cat([sae(part) for part in x_BTD.flatten(0, 1).split(4096)]).view_as(x_BTD)
    keep_BT1 = keep_BT.to(x_BTD.device)[..., None]
    x_BTD, xhat_BTD = x_BTD.double(), xhat_BTD.double()
    mean_D = (x_BTD * keep_BT1).sum((0, 1)) / keep_BT1.sum()
    total = ((x_BTD - mean_D).square() * keep_BT1).sum().clamp_min(1e-30)
    share_B = ((x_BTD - xhat_BTD).square() * keep_BT1).sum((1, 2)) / total
    return float(share_B.sum()), share_B


def scan(name: str, sae: SAE, site: str, tokens_BT: Tensor, keep_BT: Tensor, model: ModelHandle) -> Check:
    """One line: the declared site fits best among pre, mid, post, the block's other tensors and the layers beside, or which one does.

    Where another one fits better, its own neighbours are looked at too, until none is better.
    """
    if sae.config.kind != "autoencoder":
        return Check(f"{name}: site", "skipped", "a transcoder reads and writes two sites: nothing to scan")
    sae = sae.to(next(model.hf.parameters()).device)
    found: dict[str, tuple[float, Tensor]] = {}
    centre, best, width = None, site, 0
    while centre != best:
        centre = best
        asked = [other for other in [centre, *tensor.neighbours(centre, model)] if other not in found]
        read = taps.read(model.hf, tokens_BT, {other: Site.parse(other).tap(model.shape) for other in asked}) if asked else {}
        width = width or read[site].shape[-1]
        found |= {other: fvu(sae, x_BTD.to(sae.W_dec.dtype), keep_BT) for other, x_BTD in read.items() if x_BTD.shape[-1] == sae.config.d_in}
        best = min(found, key=lambda other: found[other][0]) if site in found else centre
    if site not in found:
        return Check(f"{name}: site", "failed", f"it reads rows of width {sae.config.d_in}, and {site} gives {width}", "the model and the site that it was trained on")
    order = sorted(found, key=lambda other: found[other][0])
    listed = ", ".join(f"{other} {found[other][0]:.3g}" for other in order[:4])
    here, there = found[site], found[best]
    gain_B = here[1] - there[1]  # paired by sequence
    clear = float(gain_B.sum()) > 3 * float(gain_B.std()) * len(gain_B) ** 0.5 if len(gain_B) > 1 else False
    if best != site and there[0] <= CLEARLY * min(here[0], 1.0) and clear:
        detail = f"FVU {here[0]:.3g} at {site}, {there[0]:.3g} at {best}: probably mislabelled ({listed})"
        return Check(f"{name}: site", "warning", detail, f"saes: [{{id: {name}, site: {best}, …}}] if its source agrees")
    return Check(f"{name}: site", "ok", f"FVU {here[0]:.3g} at {site}; nearest: {listed}")
