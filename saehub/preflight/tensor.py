"""Rows that claim to be one site of a model in; whether plain hooks of our own read the same there, and if not, what the rows really are, out.

Nothing here goes through the code that extractors use to read activations: hooks are set with torch alone, at the module that the site
declares, and the residual stream is also taken from the model's own `hidden_states`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saehub.activations import taps
from saehub.errors import SaehubError
from saehub.sites import Site

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle

SAME = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative Frobenius difference up to which two reads are the same tensor, by the model's dtype."""
AROUND = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out", "attn_z")
Line = tuple[str, str, str, str | None]


def hook(model: ModelHandle, site: str, tokens_BT: Tensor) -> Tensor:
    """[n, d] float32: the tensor at a site by a plain torch hook on the whole model."""
    tap = Site.parse(site).tap(model.shape)
    module: nn.Module = taps.resolve(model.hf, tap.module)
    seen: list[Tensor] = []

    def first(value: object) -> Tensor:
        return value if isinstance(value, Tensor) else next(item for item in value if isinstance(item, Tensor))

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(first(args) if args else first(kwargs.values()))

    def after(_module: nn.Module, _args: tuple, output: object) -> None:
        seen.append(first(output.values() if isinstance(output, dict) else output))

    handle = module.register_forward_pre_hook(before, with_kwargs=True) if tap.io == "in" else module.register_forward_hook(after)
    try:
        with torch.no_grad():
            model.hf(input_ids=tokens_BT.to(next(model.hf.parameters()).device))
    finally:
        handle.remove()
    return seen[0].detach().flatten(0, 1).float().clone()


def apart(x_ND: Tensor, y_ND: Tensor) -> float:
    """‖x - y‖ / ‖y‖."""
    x_ND, y_ND = x_ND.double(), y_ND.to(x_ND.device).double()
    return float((x_ND - y_ND).norm() / y_ND.norm().clamp_min(1e-30))


def neighbours(site: str, model: ModelHandle) -> list[str]:
    """Sites that one may confuse with `site`: the kinds of the same layer, and its own kind (and the stream) one and two layers off."""
    here = Site.parse(site)
    if here.kind is None or here.layer is None:
        return []
    found = [f"{kind}.{here.layer}" for kind in AROUND]
    for shift in (-1, 1, -2, 2):
        if 0 <= here.layer + shift < model.shape.n_layers:
            found += [f"{kind}.{here.layer + shift}" for kind in dict.fromkeys((here.kind, "resid_post", "resid_pre", "resid_mid"))]
    return [name for name in dict.fromkeys(found) if name != site and _exists(name, model)]


def _exists(site: str, model: ModelHandle) -> bool:
    try:
        Site.parse(site).tap(model.shape)
    except SaehubError:
        return False
    return True


def identify(site: str, x_ND: Tensor, tokens_BT: Tensor, model: ModelHandle) -> Line:
    """(name, status, detail, fix): the rows equal a plain hook at the declared module path; else what they equal instead."""
    x_ND, name = x_ND.float(), "same as a plain hook"
    y_ND = hook(model, site, tokens_BT)
    limit = SAME.get(model.hf.dtype, 1e-5)
    where = Site.parse(site).tap(model.shape)
    if x_ND.shape != y_ND.shape:
        return name, "failed", f"rows of shape {list(x_ND.shape)}, the hook at {where} reads {list(y_ND.shape)}", "extract.sites: name the tensor that is meant"
    gap = apart(x_ND, y_ND)
    if gap <= limit:
        own = _hidden(site, tokens_BT, model)
        if own is not None and apart(x_ND, own) > limit:
            return name, "failed", f"equal to the hook at {where}, not to the model's own hidden_states", "report it: the table of sites is wrong for this model"
        return name, "ok", f"differs by {gap:.1g} from a plain hook at {where}" + (" and the model's hidden_states" if own is not None else ""), None
    centred_ND = y_ND - y_ND.mean(1, keepdim=True)
    if apart(x_ND, centred_ND) <= 10 * limit:
        fix = "read the model's own weights: an extractor without center_writing_weights (TransformerLens: from_pretrained_no_processing, or native/hf)"
        return name, "failed", f"each row lacks its mean over coordinates ({gap:.1%} off): weights were centred, as TransformerLens does", fix
    read = {other: hook(model, other, tokens_BT) for other in neighbours(site, model)}
    equal = [other for other, z_ND in read.items() if z_ND.shape == x_ND.shape and apart(x_ND, z_ND) <= limit]
    if equal:
        what = " or ".join(dict.fromkeys(_confusion(site, other) for other in equal))
        return name, "failed", f"the rows are {' = '.join(equal)}, not {site}: {what}", f"extract.sites: [{equal[0]}] if that is meant, else another extractor"
    factor = float((x_ND.double() * y_ND.double()).sum() / y_ND.double().square().sum())
    if factor and apart(x_ND, factor * y_ND) <= 10 * limit:
        return name, "failed", f"the rows are {factor:.4g} times the tensor", "give raw activations: normalisation is the hub's (extract.normalize)"
    return name, "failed", f"{gap:.1%} away from a plain hook at {where}, and equal to no neighbour", "extract.uses: native/hf; check dtype, attention and weight processing"


def _confusion(site: str, other: str) -> str:
    here, there = Site.parse(site), Site.parse(other)
    if here.layer != there.layer and here.kind == there.kind:
        return "the layer is wrong"
    if {here.kind, there.kind} <= {"resid_pre", "resid_mid", "resid_post"}:
        return "the stream before and after a block are confused"
    return "another tensor of the block"


def _hidden(site: str, tokens_BT: Tensor, model: ModelHandle) -> Tensor | None:
    """[n, d]: the same tensor from the model's own `hidden_states` (embeddings, then each block's output); None where it does not hold it.

    The last entry is normed in most models, so the last block has none.
    """
    here = Site.parse(site)
    index = {"resid_pre": here.layer, "resid_post": None if here.layer is None else here.layer + 1}.get(here.kind or "")
    if index is None or index >= model.shape.n_layers:
        return None
    try:
        with torch.no_grad():
            states = model.hf(input_ids=tokens_BT.to(next(model.hf.parameters()).device), output_hidden_states=True).hidden_states
    except (TypeError, AttributeError):
        return None
    return states[index].flatten(0, 1).float() if states is not None and index < len(states) else None


def splice_back(site: str, x_ND: Tensor, tokens_BT: Tensor, model: ModelHandle) -> Line:
    """(name, status, detail, fix): putting the rows back in their place changes no logit, and putting zeros there does."""
    name = "splicing back"
    clean_BTV = taps.logits(model.hf, tokens_BT).float()
    if not bool(clean_BTV.isfinite().all()):
        return name, "warning", "the unchanged model's own logits hold NaN or infinite numbers: nothing can be compared", "model.dtype, and the model's weights"
    tap = Site.parse(site).tap(model.shape)

    def put_back(y_BTD: Tensor) -> Tensor:
        return x_ND.view(y_BTD.shape) if x_ND.numel() == y_BTD.numel() else torch.full_like(y_BTD, float("nan"))

    with torch.no_grad():
        same = (taps.splice(model.hf, tokens_BT, tap, put_back).float() - clean_BTV).abs().max()
        zero = (taps.splice(model.hf, tokens_BT, tap, torch.zeros_like).float() - clean_BTV).abs().max()
    scale = float(clean_BTV.std())
    limit = {torch.float32: 1e-4, torch.float64: 1e-4}.get(model.hf.dtype, 0.1)
    if not float(same) <= limit * scale:
        return name, "failed", f"the rows put back at {site} change logits by up to {float(same):.2g} (their spread is {scale:.2g})", "the rows are not that tensor: see above"
    if not float(zero) > limit * scale:
        return name, "failed", f"zeros at {site} change no logit: nothing downstream reads this tensor", "extract.sites: a tensor on the way to the logits"
    return name, "ok", f"changes logits by {float(same):.1g}; zeros there by {float(zero):.2g}", None
