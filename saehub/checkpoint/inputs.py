"""An SAE (and the language model, if at hand) in; rows that exercise it out, for a certificate: its probe, real activations, or synthetic ones."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.errors import UsageError
from saehub.seeds import generator

if TYPE_CHECKING:
    from saehub.checkpoint.probe import Probe
    from saehub.checkpoint.sae import SAE
    from saehub.data.model import ModelHandle

ROWS = 256
"""Fresh rows of a certificate."""
NOISE = 0.05
"""Of a synthetic row's length."""


def rows_for(sae: SAE, probe: Probe | None, model: ModelHandle | None, *, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, str]:
    """Float32 rows [N, d_in] and one phrase on what they are: the probe's, plus `rows` fresh ones, real if there is a model."""
    pieces, words = [], []
    if probe is not None:
        pieces.append(probe.x_ND.float())
        words.append(f"{probe.rows} of the golden probe")
    if model is not None:
        pieces.append(real_rows(model, str(sae.provenance.get("site") or ""), rows))
        words.append(f"{pieces[-1].shape[0]} activations of {model.spec.name}")
    else:
        pieces.append(synthetic_rows(sae, rows, seed=seed))
        words.append(f"{rows} synthetic")
    return torch.cat(pieces), " and ".join(words)


def synthetic_rows(sae: SAE, rows: int, *, seed: int = 0) -> Tensor:
    """b_dec + non-negative combinations of decoder rows + noise, float32 [rows, d_in], scaled until the mean L0 is plausible.

    Where decoder rows live at another site (transcoders) or input norms hide their scale, encoder columns take their place. Plausible is
    the architecture's k, else the number of latents combined, as near as powers of two come.
    """
    config, draw = sae.config, generator("conversion", seed, sae.config.d_in, sae.config.d_sae)
    combined = max(1, min(sae.max_active or int(config.params.get("k") or 32), 64, config.d_sae))
    tensors = sae.tensors()
    directions_FD = tensors["W_dec"] if config.kind == "autoencoder" else tensors["W_enc"].T
    chosen_NK = torch.rand(rows, config.d_sae, generator=draw).topk(combined, dim=1).indices
    coefficients_NK = -torch.log1p(-torch.rand(rows, combined, generator=draw)) + 0.1  # exponential, kept off zero
    units_NKD = directions_FD[chosen_NK].double()
    units_NKD = units_NKD / units_NKD.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    shape_ND = (coefficients_NK.double()[:, :, None] * units_NKD).sum(1)
    noise_ND = torch.randn(rows, config.d_in, generator=draw).double() * shape_ND.norm(dim=1, keepdim=True) * NOISE / config.d_in**0.5
    centre_D = tensors["b_dec"].double() if config.kind == "autoencoder" and config.subtract_b_dec else torch.zeros(config.d_in).double()
    best, nearest = None, (float("inf"), float("inf"))
    for power in range(-8, 13):
        x_ND = (centre_D + 2.0**power * (shape_ND + noise_ND)).float()
        with torch.no_grad():
            active_NF = sae.encode(x_ND, dtype=torch.float32) != 0
        l0, awake = float(active_NF.sum(1).double().mean()), float(active_NF.any(1).double().mean())
        distance = (max(0.0, 0.98 - awake), abs(log2(max(l0, 1e-3) / combined)))  # rows must be active first of all
        if distance < nearest:
            best, nearest = x_ND, distance
    return best


def real_rows(model: ModelHandle, site: str, rows: int) -> Tensor:
    """Activations of `model` at `site` on held-out embedded text, float32 [rows, d]; every fourth position but the first of each context."""
    from saehub.activations.taps import read
    from saehub.builtin.text import documents
    from saehub.sites import Site

    if not site:
        raise UsageError("the checkpoint names no site, so real activations cannot be extracted for it", fix="leave --model out, or give the site")
    tap = Site.parse(site).tap(model.shape)
    context = min(64, model.shape.context)
    contexts, kept = [], range(4, context, 4)
    for document in documents("builtin/python-docs", "heldout"):
        ids = model.tokenizer(document.text, add_special_tokens=False)["input_ids"] if len(document.text) > 400 else []
        contexts += [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)][:4]
        if len(contexts) * len(kept) >= rows:
            break
    pieces = []
    for start in range(0, len(contexts), 8):
        x_BTD = read(model.hf, torch.tensor(contexts[start : start + 8]), {"x": tap})["x"]
        pieces.append(x_BTD[:, list(kept)].flatten(0, 1).flatten(1).float().cpu())
    if not pieces:
        raise UsageError("the embedded text gives no contexts for this model", why=f"contexts have {context} tokens")
    return torch.cat(pieces)[:rows]


def open_model(model: ModelHandle | str | None, provenance: dict[str, Any]) -> ModelHandle | None:
    """A loaded model for a name, with the dtype, attention and (for the same name) revision that the checkpoint records."""
    if not isinstance(model, str):
        return model
    from saehub.api import ModelSpec
    from saehub.data.model import ModelHandle

    recorded = provenance.get("model") or {}
    settings = {key: recorded[key] for key in ("dtype", "attention") if recorded.get(key)}
    if recorded.get("name") == model and recorded.get("revision"):
        settings["revision"] = recorded["revision"]
    return ModelHandle.load(ModelSpec(model, **settings))
