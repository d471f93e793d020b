"""dictionary_learning's config in, saehub's provenance out, and back: its hook names are free text, so few of them say a site."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from saehub.checkpoint.foreign import local_shape
from saehub.errors import SaehubError
from saehub.sites import FAMILIES, KINDS, Site

_SPELLED = re.compile(rf"({'|'.join(KINDS[:-1])})_layer_(\d+)")
"""`resid_post_layer_8`: how the library's demos name a submodule."""


def provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """site, model, tokens and trainer as far as the config says. A bare `layer` names no tensor: it goes to `unknown_site` as it is."""
    trainer = config["trainer"]
    buffer = config.get("buffer") if isinstance(config.get("buffer"), dict) else {}
    found: dict[str, Any] = {}
    if isinstance(trainer.get("lm_name"), str) and trainer["lm_name"]:
        found["model"] = {"name": trainer["lm_name"]}
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    if isinstance(submodule, str) and submodule:
        spelled = _SPELLED.fullmatch(submodule)
        if spelled and layer is not None and str(layer) != spelled[2]:
            found["unknown_site"] = f"{submodule} (layer {layer})"  # they contradict each other
        else:
            site = f"{spelled[1]}.{spelled[2]}" if spelled else _site(submodule, found.get("model") or {})
            found["site" if site else "unknown_site"] = site or submodule
    elif layer is not None:
        found["unknown_site"] = layer if isinstance(layer, str) and not layer.isdigit() else f"layer {layer}"
    if isinstance(buffer.get("ctx_len"), int):
        found["tokens"] = {"context": buffer["ctx_len"]}
    if isinstance(trainer.get("trainer_class"), str):
        found["trainer"] = {"component": f"dictionary_learning {trainer['trainer_class']}"}
    return found


def _site(name: str, model: dict[str, Any]) -> str | None:
    """The site that a module's name means, if the model's family is known, or if it is spelled as a site."""
    shape = local_shape(model)
    if shape is None or shape.family not in FAMILIES:
        return _parsed(name)
    try:
        site = Site.from_foreign(name, shape)
    except SaehubError:
        return None
    return str(site) if site.kind is not None or site.module.startswith(f"{FAMILIES[shape.family][0]}.") else None


def _parsed(name: str) -> str | None:
    try:
        return str(Site.parse(name))
    except SaehubError:
        return None


def _map(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the provenance, empty where a side channel holds something else."""
    found = provenance.get(key)
    return found if isinstance(found, dict) else {}


def trainer_words(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config["trainer"]` that the provenance can fill."""
    layer, submodule = None, provenance.get("unknown_site")
    if match := re.fullmatch(r"layer (\d+)", submodule or ""):  # a bare layer, as it was read
        layer, submodule = int(match[1]), None
    if provenance.get("site"):
        site = Site.parse(provenance["site"])
        layer = site.layer
        submodule = f"{site.kind}_layer_{site.layer}" if site.layer is not None else str(site)
    return {"layer": layer, "submodule_name": submodule, "lm_name": _map(provenance, "model").get("name") or ""}


def buffer_words(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config["buffer"]`."""
    context = _map(provenance, "tokens").get("context")
    return {"ctx_len": context} if context else {}
