"""SAELens' config and tensors in, an SAE out, and back: which word of theirs is which of ours, what is folded, and what stands beside.

| SAELens | saehub | note |
|---|---|---|
| standard, transcoder, skip_transcoder | relu of that kind | decoder_norm_scaling is folded on the way out |
| topk, abstopk | topk, abstopk | rescale_acts_by_decoder_norm = decoder_norm_scaling |
| jumprelu, jumprelu_transcoder, jumprelu_skip_transcoder | jumprelu of that kind | also batchtopk, matryoshka: their θ for every latent |
| gated, matching_pursuit | the same | |
| temporal | temporal | constant_scalar_rescale = input_scale |

Training checkpoints (batchtopk and matryoshka among them) are first brought into these words by `training`; they are never written.

`metadata.saehub` is the side channel: SAELens keeps it through load and save. It is believed only if what it describes gives exactly the
config and tensors that stand in the folder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE
from saehub.errors import FormatError, SaehubError, did_you_mean
from saehub_saelens import legacy, names, training

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "saelens"
TRAINING_FORMAT = "saelens training checkpoint"
"""`origin.format` of an SAE read from one: written again it becomes an inference folder, so its config is kept but not put back."""
VERSION = "6.54.12"
"""`metadata.sae_lens_version` of what is written: below 6 the library throws the metadata away."""
SIDE_CHANNEL = "saehub"

# SAELens' word -> (our architecture, our kind)
READABLE = {
    "standard": ("relu", "autoencoder"),
    "gated": ("gated", "autoencoder"),
    "topk": ("topk", "autoencoder"),
    "abstopk": ("abstopk", "autoencoder"),
    "jumprelu": ("jumprelu", "autoencoder"),
    "matching_pursuit": ("matching_pursuit", "autoencoder"),
    "temporal": ("temporal", "autoencoder"),
    "transcoder": ("relu", "transcoder"),
    "skip_transcoder": ("relu", "skip_transcoder"),
    "jumprelu_transcoder": ("jumprelu", "transcoder"),
    "jumprelu_skip_transcoder": ("jumprelu", "skip_transcoder"),
}
WRITABLE = {ours: theirs for theirs, ours in READABLE.items()}
THRESHOLDED = ("batchtopk", "matryoshka")
"""Written as jumprelu with one threshold for all latents."""
NORMS = {"none": "none", "constant_norm_rescale": "constant_norm_rescale", "layer_norm": "layer_norm", "expected_average_only_in": "none"}
"""`expected_average_only_in` does nothing inside a SAELens SAE: its scale belongs to the trainer, which folds it before saving."""


class Unsayable(Exception):
    """Why SAELens cannot express an SAE."""


@dataclass
class Foreign:
    """A SAELens folder in memory."""

    config: dict[str, Any]
    """cfg.json."""
    tensors: dict[str, Tensor]
    """sae_weights.safetensors."""
    scaler: training.Scaler | None = None
    """Set for a training checkpoint: what its trainer did to the activations."""
    folded: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    side_channel: list[str] = field(default_factory=list)
    bit_exact: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- reading
def from_saelens(foreign: Foreign) -> SAE:
    """The SAE; FormatError for what is damaged or cannot be expressed."""
    plain = _read_plainly(foreign)
    return _from_side_channel(foreign, plain) or plain


def _read_plainly(foreign: Foreign) -> SAE:
    config = legacy.upgrade(foreign.config)
    origin: dict[str, Any] = {"format": FORMAT, "config": copy.deepcopy(foreign.config)}
    tensors, known = dict(foreign.tensors), READABLE
    unit_scaling = legacy.drop_unit_scaling(tensors)
    if unit_scaling:
        origin["unit_scaling_factor"] = unit_scaling
    if foreign.scaler is not None:
        known = READABLE | training.ARCHITECTURES
        origin |= {"format": TRAINING_FORMAT, "activation_scaler": foreign.scaler.to_json()}
        origin["folded"] = training.folds(config, foreign.scaler, set(tensors))
        config, tensors = training.prepare(config, tensors, foreign.scaler)
    word = config.get("architecture")
    if str(word) not in known:
        raise FormatError(
            f"SAELens architecture {word!r} cannot be read{did_you_mean(str(word), known)}", why=f"readable: {', '.join(known)}"
        )
    architecture, kind = known[word]
    norm = config.get("normalize_activations") or "none"
    params = _params(config, architecture, norm)
    if architecture == "temporal" and norm == "constant_scalar_rescale":
        norm = "none"
    if str(norm) not in NORMS:
        raise FormatError(
            f"normalize_activations {norm!r} cannot be read",
            why="its whitening was not folded into the weights, and the matrix is not in the folder",
        )
    norm = NORMS[norm]
    mapped = SAEConfig(
        architecture,
        d_in=_size(config, "d_in"),
        d_sae=_size(config, "d_sae"),
        d_out=_size(config, "d_out") if "transcoder" in word else 0,
        params=params,
        kind=kind,
        norm_in=norm,
        norm_out=norm if kind == "autoencoder" else "none",
        # transcoders have no such step, whatever their config says
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)) and kind == "autoencoder",
        decoder_norm_scaling=bool(config.get("rescale_acts_by_decoder_norm", False)) and word in training.RESCALED,
    )
    return SAE.build(mapped, tensors, {**names.provenance(config.get("metadata") or {}), "origin": origin})


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"cfg.json: {key} is {value!r}", why="expected a whole number")
    return value


def _params(config: dict[str, Any], architecture: str, norm: str) -> dict[str, Any]:
    if architecture == "temporal":
        scale = config.get("activation_normalization_factor", 1.0) if norm == "constant_scalar_rescale" else 1.0
        return {
            "n_heads": config.get("n_heads", 8),
            "n_attn_layers": config.get("n_attn_layers", 1),
            "bottleneck_factor": config.get("bottleneck_factor", 64),
            "k": config.get("kval_topk") if config.get("sae_diff_type", "topk") == "topk" else None,
            "tied": config.get("tied_weights", True),
            "input_scale": scale,
        }
    if architecture in ("topk", "abstopk", *THRESHOLDED):
        return {"k": config.get("k", 100)}  # SAELens' own default
    if architecture == "matching_pursuit":
        return {
            "residual_threshold": config.get("residual_threshold", 1e-2),
            "max_iterations": config.get("max_iterations"),
            "stop_on_duplicate_support": config.get("stop_on_duplicate_support", True),
        }
    return {}


def _from_side_channel(foreign: Foreign, plain: SAE) -> SAE | None:
    """What saehub put there, if writing it again gives this very folder; else None (the folder was edited, or is not ours)."""
    metadata = foreign.config.get("metadata")
    beside = metadata.get(SIDE_CHANNEL) if isinstance(metadata, dict) else None
    if not isinstance(beside, dict) or not isinstance(beside.get("config"), dict):
        return None
    try:
        config = SAEConfig.from_json(beside["config"])
        tensors = {**plain.tensors(), **_extra_tensors(beside.get("tensors"))}
        tensors = {name: tensors[name] for name in _specs(config)}
        restored = SAE.build(config, tensors, beside.get("provenance") if isinstance(beside.get("provenance"), dict) else {})
        again = to_saelens(restored)
    except (SaehubError, Unsayable, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        return None
    if not _same(again, foreign):
        return None
    # What the folder says openly wins over what stands beside: a corrected hook name must not be overruled.
    for key in ("site", "target_site", "unknown_site", "unknown_target_site"):
        if key in plain.provenance:
            restored.provenance[key] = plain.provenance[key]
    return restored


def _specs(config: SAEConfig) -> list[str]:
    from saehub.checkpoint.registry import architecture

    return list(architecture(config.architecture).specs(config))


def _extra_tensors(data: Any) -> dict[str, Tensor]:
    import torch

    dtypes = {
        str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    }
    return {
        name: torch.tensor(entry["values"], dtype=dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in dict(data or {}).items()
    }


def _same(again: Foreign, foreign: Foreign) -> bool:
    """Equal in tensors and in every config key that enters the computation (SAELens rewrites versions and devices)."""
    from saehub.checkpoint.stream import equal

    def computed(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key not in ("metadata", "device", "dtype")}

    mine = computed(again.config)
    theirs = {key: value for key, value in computed(legacy.upgrade(foreign.config)).items() if key in mine}
    if mine != theirs or again.tensors.keys() != foreign.tensors.keys():
        return False
    return all(equal(again.tensors[name], foreign.tensors[name]) for name in again.tensors)


# ---------------------------------------------------------------------- writing
def to_saelens(sae: SAE) -> Foreign:
    """cfg.json and tensors; raises Unsayable with the reason."""
    verbatim = _verbatim(sae)
    if verbatim is not None:
        return verbatim
    c = sae.config
    architecture = "jumprelu" if c.architecture in THRESHOLDED else c.architecture
    word = WRITABLE.get((architecture, c.kind))
    if word is None:
        kinds = [kind for ours, kind in WRITABLE if ours == architecture]
        raise Unsayable(f"SAELens has no {c.architecture} {c.kind}" + (f", only as {' and '.join(kinds)}" if kinds else ""))
    if c.kind == "autoencoder" and c.norm_out != c.norm_in:
        raise Unsayable(f"SAELens undoes {c.norm_in} on the output, this SAE does not")
    foreign = Foreign({}, sae.tensors())
    _fold(foreign, sae)
    dtypes = {t.dtype for t in foreign.tensors.values()}
    hooks = names.metadata(sae.provenance)
    foreign.config = {
        "architecture": word,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        # SAELens casts every tensor to this on load: a mixture must be loaded in the widest, or a float32 threshold would be rounded
        "dtype": str(_widest(dtypes)).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": c.subtract_b_dec,
        "normalize_activations": c.norm_in,
        "reshape_activations": "hook_z" if str(hooks.get("hook_name", "")).endswith("hook_z") else "none",
    }
    if c.kind != "autoencoder":
        foreign.config["d_out"] = c.d_out
    if architecture in ("topk", "abstopk"):
        foreign.config |= {"k": int(c.params["k"]), "rescale_acts_by_decoder_norm": c.decoder_norm_scaling}
    if architecture == "matching_pursuit":
        foreign.config |= dict(c.params)
    if architecture == "temporal":
        foreign.config |= {name: c.params[name] for name in ("n_heads", "n_attn_layers", "bottleneck_factor")}
        foreign.config |= {"sae_diff_type": "relu" if c.params["k"] is None else "topk", "kval_topk": c.params["k"], "tied_weights": c.params["tied"]}
        if c.params["input_scale"] != 1:
            foreign.config |= {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": c.params["input_scale"]}
    # what was folded into the tensors cannot be taken out of them again: the side channel describes the SAE that stands there
    standing = c if architecture in ("topk", "abstopk") else c.replace(decoder_norm_scaling=False)
    beside = {"config": standing.to_json(), "provenance": sae.provenance, "tensors": _beside(sae, foreign)}
    foreign.config["metadata"] = {"sae_lens_version": VERSION, "sae_lens_training_version": None, **hooks, SIDE_CHANNEL: beside}
    foreign.side_channel = [*beside["tensors"], *(["params"] if c.architecture in THRESHOLDED else []), "provenance"]
    return foreign


def _verbatim(sae: SAE) -> Foreign | None:
    """The config that the SAE was read from, if it still says exactly this SAE: a round trip changes nothing."""
    origin = sae.provenance.get("origin")
    if not isinstance(origin, dict) or origin.get("format") != FORMAT or not isinstance(origin.get("config"), dict):
        return None
    config, tensors = copy.deepcopy(origin["config"]), sae.tensors()
    if origin.get("unit_scaling_factor"):
        tensors["scaling_factor"] = legacy.unit_scaling(sae, origin["unit_scaling_factor"])
    try:
        again = _read_plainly(Foreign(config, tensors))
    except FormatError:
        return None
    if again.config != sae.config or again.tensors().keys() != sae.tensors().keys():
        return None
    return Foreign(config, tensors, bit_exact=list(sae.tensors()))


def _fold(foreign: Foreign, sae: SAE) -> None:
    """What SAELens has no flag for. Products are taken in float64 and rounded once.

    relu and thresholds with decoder_norm_scaling, n_i = ‖W_dec_i‖:  W_enc n, b_enc n, W_dec / n, θ as it is (it is compared with n p);
        16-bit tensors become float32, or the rounding would change the features
    batchtopk, matryoshka:  θ for every latent
    """
    import torch

    tensors, touched = foreign.tensors, set()
    if sae.config.decoder_norm_scaling and sae.config.architecture not in ("topk", "abstopk"):
        norm_F = tensors["W_dec"].double().norm(dim=1)
        inverse_F = torch.where(norm_F > 0, 1 / norm_F, torch.zeros_like(norm_F))
        for name, factor in (("W_enc", norm_F), ("b_enc", norm_F), ("W_dec", inverse_F[:, None])):
            tensors[name] = (tensors[name].double() * factor).to(torch.promote_types(tensors[name].dtype, torch.float32))
            touched.add(name)
        foreign.folded.append("decoder norms into W_enc, b_enc and W_dec")
    if sae.config.architecture in THRESHOLDED:
        tensors.pop("group_sizes", None)
        theta = tensors["threshold"]
        if theta.dtype == torch.float64:  # SAELens computes in float32 at most
            theta = theta.float()
            foreign.folded.append("the float64 threshold, rounded to float32")
        tensors["threshold"] = theta.expand(sae.config.d_sae).contiguous()
        touched.add("threshold")
        foreign.folded.append(f"one threshold for every latent ({sae.config.architecture} -> jumprelu)")
    foreign.bit_exact = [name for name in tensors if name not in touched]


def _beside(sae: SAE, foreign: Foreign) -> dict[str, Any]:
    """Small tensors that SAELens has no place for, as numbers (JSON keeps a float64 exactly)."""
    stored = sae.tensors()
    small = [name for name in ("threshold", "group_sizes") if sae.config.architecture in THRESHOLDED and name in stored]
    return {
        name: {
            "dtype": str(stored[name].dtype).removeprefix("torch."),
            "shape": list(stored[name].shape),
            "values": stored[name].flatten().tolist(),
        }
        for name in small
    }


def _widest(dtypes: set[Any]) -> Any:
    from functools import reduce

    import torch

    return reduce(torch.promote_types, dtypes)
