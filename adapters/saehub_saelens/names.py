"""SAELens' metadata in, saehub's provenance out, and back: hook names through `saehub.Site`, an unknown one verbatim."""

from __future__ import annotations

from typing import Any

from saehub.api import ModelShape
from saehub.errors import SaehubError
from saehub.sites import Site

_ANY = ModelShape("llama", n_layers=10**6, d_model=1, d_mlp=1, n_heads=1, d_head=1, vocab=1, context=1)
"""TransformerLens' names are the same for every decoder, so a shape with all kinds and any layer serves."""
_OTHER = ModelShape("other", n_layers=10**6, d_model=1, d_mlp=1, n_heads=1, d_head=1, vocab=1, context=1)


def provenance(metadata: dict[str, Any]) -> dict[str, Any]:
    """site, target_site, model, tokens and data as far as the metadata says. A hook name that is not in the table, or that means one head
    only, goes to `unknown_site` as it is."""
    found: dict[str, Any] = {}
    for ours, theirs in (("site", "hook_name"), ("target_site", "hook_name_out")):
        name = metadata.get(theirs)
        if isinstance(name, str) and name:
            site = _site(name) if metadata.get(theirs.replace("hook_name", "hook_head_index")) is None else None
            found[ours if site else f"unknown_{ours}"] = site or name
    if isinstance(metadata.get("model_name"), str):
        found["model"] = {"name": metadata["model_name"]}
    context, bos = metadata.get("context_size"), metadata.get("prepend_bos")
    if isinstance(context, int):
        found["tokens"] = {"context": context, "bos": "sequence" if bos else "none"}
    if isinstance(metadata.get("dataset_path"), str):
        found["data"] = {"name": metadata["dataset_path"]}
    return found


def _site(name: str) -> str | None:
    try:
        return str(Site.from_foreign(name, _OTHER))
    except SaehubError:
        return None


def metadata(provenance: dict[str, Any]) -> dict[str, Any]:
    """The keys of SAELens' metadata that the provenance can fill."""
    found: dict[str, Any] = {}
    shape = _shape(provenance.get("model") or {})
    for ours, theirs in (("site", "hook_name"), ("target_site", "hook_name_out")):
        if provenance.get(f"unknown_{ours}"):
            found[theirs] = provenance[f"unknown_{ours}"]
        elif provenance.get(ours):
            site = Site.parse(provenance[ours])
            found[theirs] = _lens_name(site, shape) or str(site)
            module = _module_name(site, shape)
            if module:
                found[f"hf_{theirs}"] = module
    model, tokens, data = (provenance.get(key) or {} for key in ("model", "tokens", "data"))
    if model.get("name"):
        found["model_name"] = model["name"]
        lens = str(found.get("hook_name", "")).find("hook_") >= 0
        found["model_class_name"] = "HookedTransformer" if lens else "AutoModelForCausalLM"
        # the hub reads unprocessed weights; TransformerLens centres them unless told not to
        found["model_from_pretrained_kwargs"] = {"center_writing_weights": False} if lens else {}
    if tokens.get("context"):
        found["context_size"] = tokens["context"]
        found["prepend_bos"] = tokens.get("bos", "sequence") != "none"
    if data.get("name"):
        found["dataset_path"] = data["name"]
    return found


def _lens_name(site: Site, shape: ModelShape | None) -> str | None:
    if shape is None and site.kind is None:
        return None  # the same module path is another tensor in another family
    try:
        return site.names(shape or _ANY)["transformer_lens"]
    except SaehubError:
        return None


def _module_name(site: Site, shape: ModelShape | None) -> str | None:
    """The Hugging Face module, if the site is a module's output (SAELens' Hugging Face wrapper hooks outputs only)."""
    if shape is None and site.module is None:
        return None
    try:
        module, _, side = (site.names(shape)["hf"] if shape else str(site)).partition(":")
    except SaehubError:
        return None
    return module if side == "out" else None


def _shape(model: dict[str, Any]) -> ModelShape | None:
    """Sizes of a model whose config.json is on this machine; never from the network."""
    from saehub.data.model import local_files, shape_of
    from saehub.jsonio import read_json

    try:
        folder = local_files(model["name"], model.get("revision")) if model.get("name") else None
        return shape_of(read_json(folder / "config.json")) if folder else None
    except (SaehubError, OSError, ValueError):
        return None
