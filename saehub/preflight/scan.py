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

CLEARLY = 0.5
"""A neighbour whose FVU is at most this share of the declared site's (or of 1, the mean's) is a probable mislabel."""


def fvu(sae: SAE, x_BTD: Tensor, keep_BT: Tensor, y_BTD: Tensor | None = None) -> float:
    """Σ‖y - ŷ‖² / Σ‖y - ȳ‖² over the rows kept; y is x for an autoencoder."""
    y_BTD = x_BTD if y_BTD is None else y_BTD
    with torch.no_grad():
        yhat_BTD = sae(x_BTD) if not sae.row_wise else torch.cat([sae(part) for part in x_BTD.flatten(0, 1).split(4096)]).view_as(y_BTD)
    y_ND, yhat_ND = y_BTD[keep_BT].double(), yhat_BTD[keep_BT].double()
    return float((y_ND - yhat_ND).square().sum() / (y_ND - y_ND.mean(0)).square().sum().clamp_min(1e-30))


def scan(name: str, sae: SAE, site: str, tokens_BT: Tensor, keep_BT: Tensor, model: ModelHandle) -> Check:
    """One line: the declared site is the best one of pre, mid, post, the block's other tensors and the layers beside, or which one is."""
    if sae.config.kind != "autoencoder":
        return Check(f"{name}: site", "skipped", "a transcoder reads and writes two sites: nothing to scan")
    read = taps.read(model.hf, tokens_BT, {other: Site.parse(other).tap(model.shape) for other in [site, *tensor.neighbours(site, model)]})
    sae = sae.to(next(iter(read.values())).device)
    found = {other: fvu(sae, x_BTD.to(sae.W_dec.dtype), keep_BT) for other, x_BTD in read.items() if x_BTD.shape[-1] == sae.config.d_in}
    if site not in found:
        return Check(f"{name}: site", "failed", f"it reads rows of {sae.config.d_in}, and {site} has another width", "saes: [{…, site: …}]: the site that it was trained on")
    best = min(found, key=found.get)
    listed = ", ".join(f"{other} {found[other]:.3g}" for other in sorted(found, key=found.get)[:4])
    if best != site and found[best] <= CLEARLY * min(found[site], 1.0):
        detail = f"FVU {found[site]:.3g} at {site}, {found[best]:.3g} at {best}: probably mislabelled ({listed})"
        return Check(f"{name}: site", "warning", detail, f"saes: [{{id: {name}, site: {best}, …}}] if its source agrees")
    return Check(f"{name}: site", "ok", f"FVU {found[site]:.3g} at {site}; nearest: {listed}")
