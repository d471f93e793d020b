"""Sparsify's config and tensors in, an SAE out, and back: which word of theirs is which of ours, and what is folded.

| Sparsify | saehub |
|---|---|
| activation topk, groupmax (multi_topk adds a loss, inference is topk's) | topk, groupmax |
| encoder.weight [M, d], encoder.bias, W_dec [M, d], b_dec, W_skip [d, d] | W_enc transposed, b_enc, W_dec, b_dec, W_skip |
| an SAE subtracts b_dec from its input, a transcoder does not | subtract_b_dec |
| skip_connection without transcode: b_dec is subtracted, and there is a skip path | skip_transcoder, b_dec W_enc folded into b_enc |
| signed: true (2024-06-21 to 2024-08-15): the k largest by absolute value, signs kept | abstopk |

Written: topk and groupmax of every kind with d_out = d_in and without run-time norms. The header of sae.safetensors holds the side channel: the
library reads past it (from cfg.json it would print it).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.foreign import (
    Foreign,
    Unsayable,
    beside,
    check_shapes,
    fold_b_dec,
    fold_decoder_norms,
    from_plain,
    restore,
    to_plain,
    unit_rows,
    whole_number,
)
from saehub.checkpoint.sae import SAE
from saehub.errors import Caution, FormatError, did_you_mean
from saehub_sparsify import names

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sparsify"
ACTIVATIONS = ("topk", "groupmax")
DEFAULTS = {"expansion_factor": 32, "num_latents": 0, "k": 32}
"""Of `SparseCoderConfig`: what the library takes where cfg.json is silent."""
FLAGS = ("normalize_decoder", "multi_topk", "skip_connection", "transcode", "signed")


# ---------------------------------------------------------------------- reading
def from_sparsify(foreign: Foreign, folder: Path | None = None) -> SAE:
    """The SAE of cfg.json and tensors, with what the folder's place in its run tells; FormatError for what is damaged or not expressible."""
    where = names.place(folder) if folder is not None else names.Place(None, None, None)
    plain, cautions = _read(foreign, where)
    restored = restore(foreign, plain, to_sparsify)
    if restored is not None:
        return restored
    for words in cautions:
        warnings.warn(f"{folder}: {words}", Caution, stacklevel=3)
    if cautions:
        plain.provenance["cautions"] = cautions
    return plain


def _read(foreign: Foreign, where: names.Place) -> tuple[SAE, list[str]]:
    config = foreign.config
    for flag in FLAGS:
        if not isinstance(config.get(flag, False), bool):
            raise FormatError(f"cfg.json: {flag} is {config[flag]!r}", why="expected true or false")
    activation = config.get("activation", "topk")
    if activation not in ACTIVATIONS:
        raise FormatError(
            f"cfg.json: activation {activation!r} cannot be read{did_you_mean(str(activation), ACTIVATIONS)}",
            why="released versions of sparsify have topk and groupmax",
        )
    d_in = whole_number(config, "d_in", "cfg.json")
    d_sae = whole_number(config, "num_latents", "cfg.json", DEFAULTS["num_latents"], least=0)
    d_sae = d_sae or d_in * whole_number(config, "expansion_factor", "cfg.json", DEFAULTS["expansion_factor"])
    skip, signed = config.get("skip_connection", False), config.get("signed", False)
    transcode, cautions = _transcodes(config, where, skip)
    expected = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_shapes(Path("sae.safetensors"), foreign.tensors, expected | ({"W_skip": (d_in, d_in)} if skip else {}))
    if signed and activation != "topk":
        raise FormatError("cfg.json: signed: true with groupmax", why="no version of sparsify had both")

    kind = "skip_transcoder" if skip else "transcoder" if transcode else "autoencoder"
    origin: dict[str, Any] = {"format": FORMAT, "config": copy.deepcopy(config)}
    mapped = SAEConfig(
        "abstopk" if signed else activation,
        d_in=d_in,
        d_sae=d_sae,
        params={"k": whole_number(config, "k", "cfg.json", DEFAULTS["k"])},
        kind=kind,
        subtract_b_dec=kind == "autoencoder",
    )
    inner = Foreign({}, _ours(foreign.tensors))
    if kind != "autoencoder" and not config.get("transcode", False):  # the encoder subtracts b_dec all the same
        origin["tensors"] = {"b_enc": to_plain(inner.tensors["b_enc"])}
        fold_b_dec(inner, subtract=False)
        origin["folded"] = inner.folded
        cautions.append("its encoder subtracts b_dec, which no transcoder of today does: b_dec W_enc was folded into b_enc")
    if signed:
        cautions.append("signed: true is read by the equation of 2024 (abstopk); today's sparsify ignores the word and computes topk")
    dtypes = {str(t.dtype).removeprefix("torch.") for t in foreign.tensors.values()}
    if len(dtypes) > 1:
        cautions.append(
            f"tensors of {' and '.join(sorted(dtypes))} are kept as they are; sparsify's own loader casts them all to one of these"
        )
    known = names.provenance(where, transcode)
    if kind != "autoencoder" and transcode is False and "site" in known:
        known["target_site"] = known["site"]  # an autoencoder with a skip path
    return SAE.build(mapped, inner.tensors, {**known, "origin": origin}), cautions


def _transcodes(config: dict[str, Any], where: names.Place, skip: bool) -> tuple[bool | None, list[str]]:
    """Whether a module's input is read and its output predicted. Until 2025-02-12 only the run's config.json said so; None: nothing does."""
    if "transcode" in config:
        return config["transcode"], []
    if where.run is not None and isinstance(where.run.get("transcode"), bool):
        return where.run["transcode"], []
    if skip:
        return None, ["cfg.json is older than 2025-02-12 and does not say whether the input of the module is read or its output"]
    if "multi_topk" in config:  # since 2024-08; transcoders came in 2024-11
        return False, ["cfg.json is older than 2025-02-12 and does not say whether this is a transcoder; it is read as an autoencoder"]
    return False, []


def _ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"], "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    return found | ({"W_skip": tensors["W_skip"]} if "W_skip" in tensors else {})


def _theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"]}  # a view: writing makes it contiguous
    return found | {name: tensor for name, tensor in tensors.items() if name not in ("W_enc", "b_enc")}


# ---------------------------------------------------------------------- writing
def to_sparsify(sae: SAE) -> Foreign:
    """cfg.json and tensors; raises Unsayable with the reason."""
    verbatim = _verbatim(sae)
    if verbatim is not None:
        return verbatim
    c = sae.config
    if c.architecture not in ACTIVATIONS:
        raise Unsayable(f"Sparsify keeps the k largest latents of a row, or of k groups; it has no {c.architecture}")
    if c.norm_in != "none":
        raise Unsayable(f"Sparsify has no run-time norms, this SAE has {c.norm_in}")
    if c.d_out != c.d_in:
        raise Unsayable(f"Sparsify's b_dec and W_skip have the width of the input: d_out {c.d_out} must be d_in {c.d_in}")
    foreign = Foreign({}, sae.tensors())
    if c.decoder_norm_scaling:
        fold_decoder_norms(foreign)
    if c.kind == "autoencoder" and not c.subtract_b_dec:
        fold_b_dec(foreign, subtract=True)
    dtypes = _widen(foreign)
    foreign.bit_exact = [name for name, tensor in sae.tensors().items() if _comes_back(foreign.tensors[name], dtypes.get(name), tensor)]
    foreign.config = {
        "activation": c.architecture,
        "expansion_factor": max(1, c.d_sae // c.d_in),  # num_latents counts where both are given
        "normalize_decoder": c.kind == "autoencoder" and unit_rows(foreign.tensors["W_dec"]),
        "num_latents": c.d_sae,
        "k": int(c.params["k"]),
        "multi_topk": False,
        "skip_connection": c.skip,
        "transcode": c.kind != "autoencoder",
        "d_in": c.d_in,
    }
    foreign.beside = beside(sae, c.replace(decoder_norm_scaling=False, subtract_b_dec=c.kind == "autoencoder"), dtypes=dtypes)
    foreign.side_channel = [*(["dtypes"] if dtypes else []), "provenance"]
    foreign.tensors = _theirs(foreign.tensors)
    return foreign


def _widen(foreign: Foreign) -> dict[str, str]:
    """All tensors in the widest of their dtypes, because the library's loader casts them to the dtype of one; returns what they were."""
    from functools import reduce

    import torch

    widest = reduce(torch.promote_types, {t.dtype for t in foreign.tensors.values()})
    narrow = {name: str(t.dtype).removeprefix("torch.") for name, t in foreign.tensors.items() if t.dtype != widest}
    for name in narrow:
        foreign.tensors[name] = foreign.tensors[name].to(widest)
    if narrow:
        foreign.folded.append(
            f"{', '.join(narrow)} stored as {str(widest).removeprefix('torch.')} (sparsify casts all tensors to one dtype)"
        )
    return narrow


def _comes_back(written: Tensor, dtype: str | None, stored: Tensor) -> bool:
    """Whether reading (which undoes the widening to another dtype) gives the stored tensor."""
    import torch

    found = written.to(getattr(torch, dtype)) if dtype else written
    return found.dtype == stored.dtype and torch.equal(found, stored)


def _verbatim(sae: SAE) -> Foreign | None:
    """The config that the SAE was read from, if it still says exactly this SAE: a round trip changes nothing."""
    origin = sae.provenance.get("origin")
    if not isinstance(origin, dict) or origin.get("format") != FORMAT or not isinstance(origin.get("config"), dict):
        return None
    config, tensors = copy.deepcopy(origin["config"]), sae.tensors()
    kept = list(tensors)
    try:
        for name, entry in dict(origin.get("tensors") or {}).items():  # what reading folded
            tensors[name] = from_plain(entry)
        foreign = Foreign(config, _theirs(tensors), bit_exact=kept)
        transcode = sae.config.kind != "autoencoder"
        again, _ = _read(foreign, names.Place(None, None, {"transcode": transcode}))
    except (FormatError, KeyError, TypeError, ValueError, RuntimeError):
        return None
    if again.config != sae.config:
        return None
    gap_F = (again.tensors()["b_enc"] - sae.tensors()["b_enc"]).abs()  # a fold may differ in its last bits on another machine
    return foreign if bool((gap_F <= 1e-6 * sae.tensors()["b_enc"].abs().max()).all()) else None
