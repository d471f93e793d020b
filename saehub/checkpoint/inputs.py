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
SEQUENCE, KEPT = 32, 0.7
"""Positions of a fresh sequence, and how much of its last row each row of a synthetic one keeps: context must predict something."""
NOISE = 0.05
"""Of a synthetic row's length."""
EDGE_ROWS, EDGE = 128, 1e-4
"""Rows that are put next to a threshold, and how near, relative to it: a threshold rounded to bf16 is off by up to 4e-3."""


def rows_for(sae: SAE, probe: Probe | None, model: ModelHandle | None, *, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, str]:
    """Float32 rows [N, d_in] and one phrase on what they are: the probe's, plus `rows` fresh ones, real if there is a model, plus rows at
    the thresholds. For an SAE that is not row-wise, as many in sequences [S, T, d_in]."""
    pieces, words = [], []
    length = None if sae.row_wise else (probe.sequence_length if probe is not None else None) or SEQUENCE
    if probe is not None:
        pieces.append(probe.x.float())
        words.append(f"{probe.rows} of the golden probe")
    if model is not None:
        pieces.append(real_rows(model, str(sae.provenance.get("site") or ""), rows, length))
        words.append(f"{pieces[-1].shape[:-1].numel()} activations of {model.spec.name}")
    else:
        pieces.append(synthetic_rows(sae, rows, seed=seed, length=length))
        words.append(f"{pieces[-1].shape[:-1].numel()} synthetic")
    if length is not None:
        words[-1] += f", in sequences of {length}"
        return torch.cat(pieces), ", ".join(words)
    edge_ND = edge_rows(sae, torch.cat(pieces), seed=seed)
    if edge_ND is not None:
        pieces.append(edge_ND)
        words.append(f"{edge_ND.shape[0]} at thresholds")
    return torch.cat(pieces), ", ".join(words)


def edge_rows(sae: SAE, x_ND: Tensor, *, seed: int = 0) -> Tensor | None:
    """Rows moved along an encoder column until one latent's pre-activation is θ (1 ± 1e-4), float32; None where no θ is stored.

    x += (θ (1 ± 1e-4) / n - p) w / ‖w‖², n the decoder norm if it scales p: ordinary rows seldom come near enough to a threshold to tell
    it from its neighbour.
    """
    tensors = sae.tensors()
    if "threshold" not in tensors or sae.config.norm_in != "none":
        return None
    theta_F = tensors["threshold"].double().expand(sae.config.d_sae).clamp(min=0)
    usable = (theta_F.isfinite() & (tensors["W_enc"].abs().amax(0) > 0)).nonzero().squeeze(1)
    if not usable.numel():
        return None
    draw = generator("edge", seed, sae.config.d_in, sae.config.d_sae)
    latents_M = usable[torch.randint(usable.numel(), (EDGE_ROWS,), generator=draw)]
    x_MD = x_ND[torch.arange(EDGE_ROWS) % x_ND.shape[0]].double()
    columns_MD = tensors["W_enc"][:, latents_M].T.double()
    p_M = (sae.centre(x_MD) * columns_MD).sum(1) + tensors["b_enc"][latents_M].double()
    goal_M = theta_F[latents_M] * (1 + EDGE * (1 - 2 * (torch.arange(EDGE_ROWS) % 2)))
    if sae.config.decoder_norm_scaling:
        goal_M = goal_M / tensors["W_dec"][latents_M].double().norm(dim=1).clamp(min=1e-30)
    return (x_MD + ((goal_M - p_M) / columns_MD.square().sum(1))[:, None] * columns_MD).float()


def synthetic_rows(sae: SAE, rows: int, *, seed: int = 0, length: int | None = None) -> Tensor:
    """b_dec + non-negative combinations of decoder rows + noise, float32 [rows, d_in], scaled until the mean L0 is plausible; with
    `length`, in sequences [S, length, d_in] whose rows resemble those before them.

    Where decoder rows live at another site (transcoders) or input norms hide their scale, encoder columns take their place. Plausible is
    the architecture's k, else the number of latents combined, as near as powers of two come; among those, the scale that wakes most
    latents (at a small one the biases choose, always the same).
    """
    rows = rows if length is None else -(-rows // length) * length
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
    if length is not None:
        shape_ND, noise_ND = _sequences(shape_ND, length), noise_ND.reshape(-1, length, config.d_in)
    centre_D = tensors["b_dec"].double() if config.kind == "autoencoder" and config.subtract_b_dec else torch.zeros(config.d_in).double()
    best, nearest = shape_ND.float(), (float("inf"), 0.0, 0.0)
    for power in range(-8, 13):
        x_ND = (centre_D + 2.0**power * (shape_ND + noise_ND)).float()
        with torch.no_grad():
            active_NF = (sae.encode(x_ND, dtype=torch.float32) != 0).flatten(0, -2)
        l0, awake, exercised = (float(share.double().mean()) for share in (active_NF.sum(1), active_NF.any(1), active_NF.any(0)))
        # rows must be active first of all; half a power of two of L0 matters less than waking more latents
        distance = (round(max(0.0, 0.98 - awake), 2), round(2 * abs(log2(max(l0, 1e-3) / combined))) / 2, -exercised)
        if distance < nearest:
            best, nearest = x_ND, distance
    return best


def _sequences(rows_ND: Tensor, length: int) -> Tensor:
    """Rows to sequences [S, length, d]:  x_t = 0.7 x_{t-1} + row_t."""
    x_STD = rows_ND.reshape(-1, length, rows_ND.shape[1]).clone()
    for position in range(1, length):
        x_STD[:, position] += KEPT * x_STD[:, position - 1]
    return x_STD


def real_rows(model: ModelHandle, site: str, rows: int, length: int | None = None) -> Tensor:
    """Activations of `model` at `site` on held-out embedded text, float32 [rows, d]; every fourth position but the first of each context.
    With `length`, whole sequences [S, length, d] from the start of a context."""
    from saehub.activations.taps import read
    from saehub.builtin.text import documents
    from saehub.sites import Site

    if not site:
        raise UsageError(
            "the checkpoint names no site, so real activations cannot be extracted for it", fix="leave --model out, or give the site"
        )
    tap = Site.parse(site).tap(model.shape)
    context = min(64, model.shape.context) if length is None else length
    if context > model.shape.context:
        raise UsageError(f"sequences of {context} tokens, and the model accepts {model.shape.context}", fix="leave --model out")
    contexts, kept = [], range(4, context, 4) if length is None else range(context)
    for document in documents("builtin/python-docs", "heldout"):
        ids = model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] if len(document.text) > 400 else []
        contexts += [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)][:4]
        if len(contexts) * len(kept) >= rows:
            break
    pieces = []
    for start in range(0, len(contexts), 8):
        x_BTD = read(model.hf, torch.tensor(contexts[start : start + 8]), {"x": tap})["x"]
        x_BTD = x_BTD[:, list(kept)].flatten(2).float().cpu()
        pieces.append(x_BTD.flatten(0, 1) if length is None else x_BTD)
    if not pieces:
        raise UsageError("the embedded text gives no contexts for this model", why=f"contexts have {context} tokens")
    return torch.cat(pieces)[: rows if length is None else -(-rows // length)]


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
