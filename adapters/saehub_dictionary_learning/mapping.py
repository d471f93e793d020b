"""dictionary_learning's config and state dict in, an SAE out, and back: which class is which architecture, what is folded, what stands beside.

| class | saehub | b_dec subtracted |
|---|---|---|
| AutoEncoder, AutoEncoderNew | relu | yes, no |
| AutoEncoderTopK | topk (its tracked threshold is not used by `encode`; it is kept in `origin`) | yes |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | batchtopk, matryoshka: the stored threshold | yes |
| JumpReluAutoEncoder | jumprelu; also written for batchtopk and matryoshka that do not subtract b_dec | no |
| GatedAutoEncoder | gated | yes |
| IdentityDict | abstopk with k = d_sae = d_in and unit matrices, which is the identity | |

`saehub` in config.json is the side channel; the library reads `trainer` only.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.foreign import (
    SIDE_CHANNEL,
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
from saehub.jsonio import sha256_tensor
from saehub_dictionary_learning import names

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "dictionary_learning"
IDENTITY = "IdentityDict"
MAX_IDENTITY = 16_384
"""Widest identity: a file without tensors could claim any width."""


@dataclass(frozen=True)
class Layout:
    """How a class stores an architecture."""

    architecture: str
    subtract: bool
    """Whether `encode` subtracts the decoder's bias."""
    tensors: dict[str, str]
    """Our name -> theirs; a leading `T ` stands for transposed."""
    buffers: tuple[str, ...] = ()
    """Scalars beside the weights that our architecture does not store."""


_LINEAR = {"W_enc": "T encoder.weight", "b_enc": "encoder.bias", "W_dec": "T decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LAYOUTS = {
    "AutoEncoder": Layout("relu", True, {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": Layout("relu", False, {**_LINEAR, "b_dec": "decoder.bias"}),
    "AutoEncoderTopK": Layout("topk", True, {**_LINEAR, "b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": Layout("batchtopk", True, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, ("k",)),
    "MatryoshkaBatchTopKSAE": Layout("matryoshka", True, {**_PLAIN, "threshold": "threshold", "group_sizes": "group_sizes"}, ("k",)),
    "JumpReluAutoEncoder": Layout("jumprelu", False, {**_PLAIN, "threshold": "threshold"}),
    "GatedAutoEncoder": Layout(
        "gated",
        True,
        {
            "W_enc": "T encoder.weight",
            "W_dec": "T decoder.weight",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
}
THRESHOLDED = ("batchtopk", "matryoshka")
WRITABLE = {("relu", True): "AutoEncoder", ("relu", False): "AutoEncoderNew"} | {
    (layout.architecture, subtract): name for name, layout in LAYOUTS.items() if layout.architecture != "relu" for subtract in (True, False)
}


@dataclass(frozen=True)
class Stored:
    """A folder's content, checked."""

    dict_class: str
    sizes: dict[str, Any]
    """What the class is made with: activation_dim, dict_size, k, group_sizes."""
    state: dict[str, Tensor]
    norm_factor: float | None = None
    """Of a backup: its rows are divided by this."""
    step: int | None = None


# ---------------------------------------------------------------------- reading
def stored(config: Mapping[str, Any], found: Mapping[str, Any], file: Path, copy: bool = True) -> Stored:
    """The class, its sizes and its state dict, from config.json and the map in ae.pt; FormatError for what is damaged or ambiguous."""
    from saehub_dictionary_learning.pickled import tensors

    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise FormatError(
            "config.json does not name trainer.dict_class", why="tensors alone do not tell a TopK from a BatchTopK dictionary"
        )
    dict_class = trainer["dict_class"]
    if dict_class not in LAYOUTS and dict_class != IDENTITY:
        raise FormatError(
            f"dictionary class {dict_class!r} cannot be read{did_you_mean(dict_class, LAYOUTS)}",
            why=f"readable: {', '.join([*LAYOUTS, IDENTITY])}",
        )
    norm_factor = step = None
    if isinstance(found.get("ae"), Mapping):  # a backup in the middle of training, as the library's git version writes it
        norm_factor, step, found = found.get("norm_factor"), found.get("step"), found["ae"]
        if norm_factor is not None and not (isinstance(norm_factor, (int, float)) and 0 < norm_factor < float("inf")):
            raise FormatError(f"{file}: norm_factor is {norm_factor!r}", why="expected a positive number")
    if dict_class == IDENTITY:
        check_shapes(file, tensors(file, found), {})
        width = whole_number(trainer, "activation_dim", "config.json")
        if width > MAX_IDENTITY:
            raise FormatError(f"config.json: activation_dim is {width}", why=f"an identity is read up to {MAX_IDENTITY}, as two matrices")
        return Stored(dict_class, {"activation_dim": width}, {})
    layout = LAYOUTS[dict_class]
    encoder = layout.tensors["W_enc"]
    shape = getattr(found.get(encoder.removeprefix("T ")), "shape", ())
    if len(shape) != 2:
        raise FormatError(
            f"{file} has no matrix {encoder.removeprefix('T ')}", why=f"a {dict_class} has; there are {', '.join(map(str, found))[:300]}"
        )
    d_in, d_sae = (shape[1], shape[0]) if encoder.startswith("T ") else shape
    sizes: dict[str, Any] = {"activation_dim": whole_number(trainer, "activation_dim", "config.json", d_in)}
    sizes["dict_size"] = whole_number(trainer, "dict_size", "config.json", d_sae)
    state = tensors(file, found, copy)
    check_shapes(file, state, _shapes(layout, sizes, state), optional=layout.buffers)
    if "k" in layout.buffers:
        sizes["k"] = _k(trainer, state, file)
    if "group_sizes" in state:
        sizes["group_sizes"] = state["group_sizes"].tolist()
    return Stored(dict_class, sizes, state, norm_factor, step)


def _shapes(layout: Layout, sizes: Mapping[str, int], state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Their name -> shape."""
    d, F = sizes["activation_dim"], sizes["dict_size"]
    ours = {"W_enc": (d, F), "W_dec": (F, d), "b_dec": (d,), "group_sizes": tuple(getattr(state.get("group_sizes"), "shape", (0,)))}
    ours["threshold"] = () if layout.architecture in THRESHOLDED else (F,)
    found: dict[str, tuple[int, ...]] = {}
    for name, theirs in layout.tensors.items():
        shape = ours.get(name, (F,))
        found[theirs.removeprefix("T ")] = tuple(reversed(shape)) if theirs.startswith("T ") else shape
    if layout.architecture in THRESHOLDED and "threshold" not in state:
        raise FormatError(
            "the dictionary has no threshold",
            why="before 2024-12 such a dictionary kept the k·n largest of each batch of n rows, so what a row gives depends on its neighbours",
            fix="estimate one on real activations (the mean of the smallest kept one), and store it as `threshold`",
        )
    return found | {name: () for name in layout.buffers}


def _k(trainer: Mapping[str, Any], state: Mapping[str, Tensor], file: Path) -> int:
    buffered = int(state["k"]) if "k" in state else None
    k = whole_number(trainer, "k", "config.json", buffered)
    if buffered is not None and buffered != k:
        raise FormatError(
            f"{file} says k is {buffered}, config.json {k}",
            why="the library refuses that too; a file saved while k was still annealed looks like this",
            fix="correct trainer.k in config.json if the file is right",
        )
    return k


def from_dictionary_learning(config: dict[str, Any], found: Mapping[str, Any], file: Path) -> SAE:
    """The SAE of config.json and the map in ae.pt; FormatError for what is damaged or not expressible."""
    content = stored(config, found, file)
    plain, cautions = _read(config, content)
    restored = restore(Foreign(config, content.state, config.get(SIDE_CHANNEL)), plain, to_dictionary_learning)
    if restored is not None:
        return restored
    for words in cautions:
        warnings.warn(f"{file}: {words}", Caution, stacklevel=3)
    if cautions:
        plain.provenance["cautions"] = cautions
    return plain


def _read(config: dict[str, Any], content: Stored) -> tuple[SAE, list[str]]:
    cautions: list[str] = []
    origin: dict[str, Any] = {"format": FORMAT, "config": copy.deepcopy(config)}
    if content.dict_class == IDENTITY:
        return _identity(content.sizes["activation_dim"], {**names.provenance(config), "origin": origin}), cautions
    layout = LAYOUTS[content.dict_class]
    tensors = {}
    for name, theirs in layout.tensors.items():
        tensors[name] = content.state[theirs[2:]].T if theirs.startswith("T ") else content.state[theirs]
    origin["buffers"] = {name: to_plain(content.state[name]) for name in layout.buffers if name in content.state}
    sae = SAE.build(_config(content), tensors, {**names.provenance(config), "origin": origin})
    if content.step is not None:
        origin["backup"] = {"step": content.step, "norm_factor": content.norm_factor}
        cautions.append(f"a backup in the middle of training (step {content.step})")
    if content.norm_factor is not None:
        sae = sae.scale_input(1 / content.norm_factor)
        origin["folded"] = [f"norm_factor {content.norm_factor} into biases and thresholds"]
        cautions.append(f"it was saved for rows divided by {content.norm_factor}: biases and thresholds were multiplied by that")
    if "threshold" in origin["buffers"]:
        origin["biases"] = _biases(sae)
    if layout.architecture in ("relu", "gated") and not unit_rows(sae.W_dec):
        lengths_F = sae.W_dec.float().norm(dim=1)
        low, high = float(lengths_F.min()), float(lengths_F.max())
        cautions.append(
            f"decoder rows have lengths from {low:.3g} to {high:.3g}; some versions of the library load such features multiplied by them"
        )
    return sae, cautions


def _config(content: Stored) -> SAEConfig:
    layout, sizes = LAYOUTS[content.dict_class], content.sizes
    params = {"k": sizes["k"]} if "k" in sizes else {}
    return SAEConfig(layout.architecture, sizes["activation_dim"], sizes["dict_size"], params=params, subtract_b_dec=layout.subtract)


def _biases(sae: SAE) -> list[str]:
    """What tells whether an SAE still has the units that a threshold beside it is in."""
    return [sha256_tensor(sae.b_enc), sha256_tensor(sae.b_dec)]


def _identity(d: int, provenance: dict[str, Any]) -> SAE:
    """f = x: the d largest |p| of d are all of them, and p = x."""
    import torch

    tensors = {"W_enc": torch.eye(d), "b_enc": torch.zeros(d), "W_dec": torch.eye(d), "b_dec": torch.zeros(d)}
    return SAE.build(SAEConfig("abstopk", d, d, params={"k": d}), tensors, provenance)


def _is_identity(sae: SAE) -> bool:
    import torch

    c = sae.config
    if c.architecture != "abstopk" or c.kind != "autoencoder" or c.norm_in != "none" or not c.d_in == c.d_sae == c.params["k"]:
        return False
    unit = torch.eye(c.d_in, device=sae.W_enc.device)
    matrices = all(torch.equal(matrix.float(), unit) for matrix in (sae.W_enc, sae.W_dec))
    return matrices and not bool(sae.b_enc.any()) and not bool(sae.b_dec.any())


# ---------------------------------------------------------------------- writing
def to_dictionary_learning(sae: SAE) -> Foreign:
    """config.json and the state dict; raises Unsayable with the reason."""
    verbatim = _verbatim(sae)
    if verbatim is not None:
        return verbatim
    c = sae.config
    if _is_identity(sae):
        narrow = {name: str(t.dtype).removeprefix("torch.") for name, t in sae.tensors().items() if str(t.dtype) != "torch.float32"}
        foreign = Foreign({"trainer": {"dict_class": IDENTITY, "activation_dim": c.d_in, **names.trainer_words(sae.provenance)}}, {})
        foreign.beside = beside(sae, c, dtypes=narrow)
        foreign.bit_exact, foreign.side_channel = list(sae.tensors()), ["dtypes", "provenance"]
        return foreign
    dict_class = WRITABLE.get((c.architecture, c.subtract_b_dec))
    if dict_class is None:
        raise Unsayable(f"dictionary_learning has no class for {c.architecture}")
    if c.kind != "autoencoder":
        raise Unsayable(f"dictionary_learning has autoencoders only, this is a {c.kind}")
    if c.norm_in != "none":
        raise Unsayable(f"dictionary_learning has no run-time norms, this SAE has {c.norm_in}")
    expand = c.architecture in THRESHOLDED and (not c.subtract_b_dec or "k" not in c.params)
    dict_class = "JumpReluAutoEncoder" if expand else dict_class
    layout = LAYOUTS[dict_class]
    foreign = Foreign({}, sae.tensors())
    if c.decoder_norm_scaling:
        fold_decoder_norms(foreign)
    if c.subtract_b_dec != layout.subtract:
        fold_b_dec(foreign, subtract=layout.subtract)
    if expand:
        foreign.tensors["threshold"] = foreign.tensors["threshold"].expand(c.d_sae).contiguous()
        foreign.tensors.pop("group_sizes", None)
        foreign.folded.append(f"one threshold for every latent ({c.architecture} -> JumpReluAutoEncoder)")
    aside = ("threshold", "group_sizes") if expand else ()
    foreign.bit_exact = [name for name, tensor in sae.tensors().items() if name in aside or _same(foreign.tensors[name], tensor)]
    standing = c.replace(decoder_norm_scaling=False, subtract_b_dec=layout.subtract)
    foreign.side_channel = [*(name for name in aside if name in sae.tensors()), *(["params"] if c.params else []), "provenance"]
    state = _theirs(foreign.tensors, layout)
    trainer = {"dict_class": dict_class, "activation_dim": c.d_in, "dict_size": c.d_sae}
    if "k" in layout.buffers:
        trainer["k"] = max(1, round(c.params["k"]))  # of a BatchTopK it is the average in training, and need not be whole
        state |= _buffers(trainer["k"], layout)
    foreign.config = {"trainer": trainer | names.trainer_words(sae.provenance)}
    if buffer := names.buffer_words(sae.provenance):
        foreign.config["buffer"] = buffer
    foreign.beside = beside(sae, standing, tensors=aside)
    foreign.tensors = state
    return foreign


def _theirs(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The state dict, transposed ones as views: saving makes them contiguous."""
    return {
        theirs.removeprefix("T "): tensors[name].T if theirs.startswith("T ") else tensors[name] for name, theirs in layout.tensors.items()
    }


def _buffers(k: int, layout: Layout) -> dict[str, Tensor]:
    """What the class stores beside: k, and where our architecture has no threshold, -1, which means that none was tracked."""
    import torch

    made = {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    return {name: made[name] for name in layout.buffers}


def _same(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(a, b)


def _verbatim(sae: SAE) -> Foreign | None:
    """The config that the SAE was read from, if it still says exactly this SAE: a round trip changes nothing."""
    origin = sae.provenance.get("origin")
    if not isinstance(origin, dict) or origin.get("format") != FORMAT or not isinstance(origin.get("config"), dict):
        return None
    config = copy.deepcopy(origin["config"])
    try:
        dict_class = config["trainer"]["dict_class"]
        if dict_class == IDENTITY:
            return Foreign(config, {}, bit_exact=list(sae.tensors())) if _is_identity(sae) and sae.W_enc.element_size() == 4 else None
        layout = LAYOUTS[dict_class]
        state = _theirs(sae.tensors(), layout)
        state |= {name: from_plain(entry) for name, entry in dict(origin.get("buffers") or {}).items() if name in layout.buffers}
        if "threshold" in layout.buffers and "threshold" in state and origin.get("biases") != _biases(sae):
            state["threshold"] = _buffers(1, layout)["threshold"]  # the SAE was rescaled since: it is in other units
        again = _config(stored(config, state, Path("ae.pt"), copy=False))
    except (FormatError, KeyError, TypeError, ValueError, RuntimeError):
        return None
    return Foreign(config, state, bit_exact=list(sae.tensors())) if again == sae.config else None
