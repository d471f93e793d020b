"""A Sparsify folder's place in its run in; hookpoint, seed, sites, model and data as provenance out. cfg.json itself names none of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saehub.api import ModelShape
from saehub.checkpoint.foreign import local_shape, read_config
from saehub.errors import SaehubError, UsageError
from saehub.sites import FAMILIES, Site

RUN_CONFIG = "config.json"
"""The run's settings (`TrainConfig`, and from the command line `RunConfig`), in the folder that holds the hookpoints' folders."""
_HOOKPOINT = re.compile(r"(?:[A-Za-z_]\w*\.)+\d+(?:\.\w+)*|layer_\d+|embed_tokens|embed_in|wte")


@dataclass(frozen=True)
class Place:
    """Where in a run a checkpoint's folder stands."""

    hookpoint: str | None
    """The module, relative to the base model (`layers.3.mlp`); None if the folder's name is none."""
    seed: int | None
    """Of a run with several `init_seeds` (folder `seedN`)."""
    run: dict[str, Any] | None
    """The run's settings, if they are there."""


def place(folder: Path) -> Place:
    """From the names of the folder and its parents; never raises."""
    folder = Path(folder).resolve()
    seed = None
    if match := re.fullmatch(r"seed(\d+)", folder.name):
        seed, folder = int(match[1]), folder.parent
    try:
        run = read_config(folder.parent / RUN_CONFIG)
    except (SaehubError, OSError):
        run = None
    if run is None or not isinstance(run.get("sae"), dict):
        run = None
    hookpoints = (run or {}).get("hookpoints")
    named = isinstance(hookpoints, list) and folder.name in hookpoints
    return Place(folder.name if named or _HOOKPOINT.fullmatch(folder.name) else None, seed, run)


def provenance(where: Place, transcode: bool | None) -> dict[str, Any]:
    """site, target_site, model, data, tokens and trainer, as far as the place tells. `transcode` None: it may be a transcoder or not."""
    run, found = where.run or {}, {}
    if isinstance(run.get("model"), str):
        found["model"] = {"name": run["model"]} | ({"revision": run["revision"]} if isinstance(run.get("revision"), str) else {})
    if isinstance(run.get("dataset"), str):
        found["data"] = {"name": run["dataset"]}
    if isinstance(run.get("ctx_len"), int):
        found["tokens"] = {"context": run["ctx_len"]}
    if where.run is not None:
        found["trainer"] = {"component": "sparsify", "config": run} | ({"seed": where.seed} if where.seed is not None else {})
    if where.hookpoint:
        found |= _sites(where.hookpoint, transcode, local_shape(found.get("model") or {}))
    return found


def _sites(hookpoint: str, transcode: bool | None, shape: ModelShape | None) -> dict[str, str]:
    """An SAE reads its module's output; a transcoder reads the input and predicts the output."""
    if transcode is None:
        return {"unknown_site": hookpoint}
    wanted = {"site": f"{hookpoint}:in", "target_site": f"{hookpoint}:out"} if transcode else {"site": f"{hookpoint}:out"}
    found = {}
    for key, name in wanted.items():
        site = translate(name, shape)
        found[key if site else f"unknown_{key}"] = site or hookpoint
    return found


def translate(name: str, shape: ModelShape | None) -> str | None:
    """The site of a module's side, `layers.3.mlp:out`; None if the model's family does not have it, or the family is unknown and those
    that have such a module disagree (`layers.3.mlp:out` is what Llama adds to the stream, but Gemma 2 norms it first)."""
    if shape is not None:
        return _in_family(name, shape) if shape.family in FAMILIES else None
    sites = {_in_family(name, ModelShape(family, 10**6, 1, 1, 1, 1, 1, 1)) for family in FAMILIES} - {None}
    return sites.pop() if len(sites) == 1 else None


_CALLED_BY_KEYWORD = {"self_attn": "o_proj", "attention": "dense"}
"""Modules that models call with keyword arguments only, which the library's hook cannot read (trainer.py:360); and their last linear layer,
whose output is the same tensor."""


def hookpoint(site: str, target_site: str | None, shape: ModelShape) -> str:
    """The module (from the base model) whose output an SAE replaces: that which gives `site`, or that between `site` and `target_site`.

    UsageError where there is none.
    """
    if target_site is not None:
        reads, gives = Site.parse(site).tap(shape), Site.parse(target_site).tap(shape)
        if (reads.io, gives.io) != ("in", "out") or reads.module != gives.module:
            raise UsageError("they are not the input and the output of one module", fix="such as site: mlp_in.2, target_site: mlp_out.2")
        prefix = FAMILIES[shape.family][0] if shape.family in FAMILIES else ""
        return reads.module.removeprefix(f"{prefix}.")
    name = Site.parse(site).names(shape)["sparsify"]
    if name is None:
        raise UsageError("no module of this model gives it as its output", fix="a site that one does, such as resid_post.2, mlp_in.2 or mlp_out.2")
    last = name.rpartition(".")[2]
    return f"{name}.{_CALLED_BY_KEYWORD[last]}" if last in _CALLED_BY_KEYWORD else name


def _in_family(name: str, shape: ModelShape) -> str | None:
    try:
        site = Site.from_foreign(name, shape)
    except SaehubError:
        return None
    prefix = FAMILIES[shape.family][0]
    return str(site) if site.kind is not None or site.module.startswith(f"{prefix}.") else None
