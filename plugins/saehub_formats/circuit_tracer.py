"""One layer of a circuit-tracer transcoder set in, a transcoder out, and back (safety-research/circuit-tracer 0.5).

    config.yaml                 model_name, model_kind: transcoder_set, feature_input_hook, feature_output_hook, scan [, transcoders: files]
    layer_0.safetensors …       one a layer

| tensor | shape | here |
|---|---|---|
| W_enc | [d_sae, d] | W_enc, transposed |
| b_enc | [d_sae] | b_enc |
| activation_function.threshold (JumpReLU only) | [d_sae] | threshold |
| W_dec | [d_sae, d] | W_dec |
| b_dec | [d] | b_dec |
| W_skip (optional) | [d, d], out by in | W_skip |

    p = x W_encᵀ + b_enc;   f = max(p, 0), or p [p > θ];   ŷ = f W_dec + b_dec  (+ x W_skipᵀ)

Hooks are TransformerLens' names without `blocks.{layer}.`, the same for every layer. A set has all layers from 0 on; saehub reads and writes
one at a time: a file is named to read it, and further layers may be written into the same folder. Cross-layer transcoders (`model_kind:
cross_layer_transcoder`) write to several layers and are refused. Files listed under `transcoders` must lie in the folder. What the tensors
cannot say is in `layer_0.saehub.json`, believed only if it describes this very file. Source: transcoder/single_layer_transcoder.py and
utils/hf_utils.py of the wheel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, SIDE_CHANNEL, Foreign, Unsayable, check_shapes, read_config, restore
from saehub.errors import CheckFailed, FormatError, SaehubError, UsageError
from saehub_formats.common import build, combine, multiply, shape_of_family, sites
from saehub_formats.files import MAX_TEXT_BYTES, read_yaml
from saehub_formats.jump import fold_to_jumprelu

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT, CONFIG, THRESHOLD = "circuit_tracer", "config.yaml", "activation_function.threshold"
HOOKS = ("feature_input_hook", "feature_output_hook")
_LAYER = re.compile(r"layer_(\d+)\.safetensors")


class CircuitTracer:
    """The exporter `circuit_tracer`: a layer's file beside its config.yaml, or a folder with one layer."""

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        """A config.yaml with circuit-tracer's keys, beside the file or in the folder."""
        try:
            file = _folder(Path(path)) / CONFIG
            if Path(path).is_file() and not Path(path).match("*.safetensors"):
                return False
            return file.is_file() and file.stat().st_size <= MAX_TEXT_BYTES and set(HOOKS) <= read_yaml(file).keys()
        except (SaehubError, OSError):
            return False

    def read(self, path: Path) -> SAE:
        """The transcoder, tensors bit-exact (W_enc transposed); FormatError for damage, several layers, and lists that leave the folder."""
        layer, file, config = _find(Path(path))
        side = _beside(file)
        foreign = Foreign({**config, **side}, _tensors(file), side.get(SIDE_CHANNEL))
        plain = _read_plainly(foreign, config, layer, file)
        return restore(foreign, plain, lambda sae: to_circuit_tracer(sae)[1]) or plain

    def refusal(self, sae: SAE) -> str | None:
        """Why circuit-tracer cannot say this SAE, or None."""
        try:
            to_circuit_tracer(sae)
        except Unsayable as reason:
            return str(reason)
        return None

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write the layer's file and config.yaml into the folder `path`, which may hold other layers of the same set already."""
        import yaml

        from saehub.checkpoint.format import write_tensors
        from saehub.jsonio import write_json_atomic, write_text_atomic

        path = Path(path)
        try:
            layer, foreign = to_circuit_tracer(sae)
        except Unsayable as reason:
            raise CheckFailed("circuit-tracer cannot say this SAE", why=str(reason), fix="saehub's own format can") from reason
        side = {SIDE_CHANNEL: foreign.config[SIDE_CHANNEL]}
        config = {key: value for key, value in foreign.config.items() if key != SIDE_CHANNEL}
        if (path / CONFIG).is_file() and read_yaml(path / CONFIG) != config:
            raise UsageError(
                f"{path} holds another set", why=f"its {CONFIG} names other hooks or another model", fix="choose another folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / f"layer_{layer}.safetensors", foreign.tensors)
        write_json_atomic(path / f"layer_{layer}.saehub.json", side)
        write_text_atomic(path / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return foreign.notes()

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and prediction [n, d] of rows [n, d]: the published equation in float64, rounded once."""
        stored = _tensors(_find(Path(path))[1])
        p_NF = multiply(x_ND, stored["W_enc"].T) + stored["b_enc"].double()
        f_NF = p_NF * (p_NF > stored[THRESHOLD].double()) if THRESHOLD in stored else p_NF.clamp(min=0)
        y_ND = combine(f_NF, stored["W_dec"]) + stored["b_dec"].double()
        if "W_skip" in stored:
            y_ND = y_ND + multiply(x_ND, stored["W_skip"].T)
        return f_NF.float(), y_ND.float()


# ---------------------------------------------------------------------- reading
def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _find(path: Path) -> tuple[int, Path, dict[str, Any]]:
    """Layer, file and config; FormatError where it is not one layer."""
    folder = _folder(path)
    config = read_yaml(folder / CONFIG)
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise FormatError(
            f"{folder / CONFIG}: model_kind {kind!r} cannot be read",
            why="a cross-layer transcoder writes to several layers, an SAE to one",
            fix="only transcoder_set",
        )
    files = _listed(folder, config["transcoders"]) if config.get("transcoders") else _globbed(folder)
    if path.is_file():
        layer = next((layer for layer, file in files.items() if file.resolve() == path.resolve()), None)
        if layer is None:
            raise FormatError(
                f"{path} is not a layer of {folder / CONFIG}",
                why=f"layers: {', '.join(file.name for file in files.values()) or 'none'}",
                fix=RESTORE,
            )
        return layer, path, config
    if not files:
        raise FormatError(f"{folder} holds no layer_*.safetensors", why=f"its {CONFIG} speaks of a transcoder set", fix=RESTORE)
    if len(files) > 1:
        shown = ", ".join(str(file) for file in list(files.values())[:3])
        raise FormatError(
            f"{folder} holds {len(files)} transcoders",
            why="one is read at a time",
            fix=f"name one of its files: {shown}{' …' if len(files) > 3 else ''}",
        )
    return *next(iter(files.items())), config


def _globbed(folder: Path) -> dict[int, Path]:
    found = {int(match[1]): file for file in folder.glob("layer_*.safetensors") if (match := _LAYER.fullmatch(file.name))}
    return dict(sorted(found.items()))


def _listed(folder: Path, entries: Any) -> dict[int, Path]:
    """The files under `transcoders`: in order of layer, or maps with `layer` and `filepath`; none may lie outside the folder."""
    found: dict[int, Path] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        layer, name = (entry.get("layer"), entry.get("filepath")) if isinstance(entry, dict) else (index, entry)
        if not isinstance(name, str) or isinstance(layer, bool) or not isinstance(layer, int):
            raise FormatError(f"{folder / CONFIG}: transcoders holds {entry!r}", why="expected the name of a file", fix=RESTORE)
        if name.startswith("hf://"):
            raise FormatError(
                f"{folder / CONFIG} lists {name}",
                why="that file is not in this folder",
                fix="download it and read it by itself: saehub inspect FOLDER",
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:  # links are the hub cache's own
            raise FormatError(
                f"{folder / CONFIG} lists {name}",
                why="that lies outside the folder",
                fix="put the file into the folder and list its bare name",
            )
        if not name.endswith(".safetensors"):
            raise FormatError(
                f"{folder / CONFIG} lists {name}",
                why="layers are safetensors files",
                fix="Gemma Scope's params.npz is a format of its own: name its folder",
            )
        found[layer] = folder / name
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    """As stored, checked: shapes, no NaN, no negative threshold (for which the library's equation lets negative features pass)."""
    from saehub.checkpoint.format import read_tensors

    stored = read_tensors(file)
    encoder, decoder = stored.get("W_enc"), stored.get("W_dec")
    if encoder is None or decoder is None or encoder.ndim != 2:
        raise FormatError(f"{file} has no W_enc or no W_dec", why=f"it holds {', '.join(stored) or 'nothing'}", fix=RESTORE)
    d_sae, d = encoder.shape
    shapes = {"W_enc": (d_sae, d), "b_enc": (d_sae,), "W_dec": (d_sae, d), "b_dec": (d,), "W_skip": (d, d), THRESHOLD: (d_sae,)}
    check_shapes(file, stored, shapes, optional=("W_skip", THRESHOLD))
    if THRESHOLD in stored and bool((stored[THRESHOLD] < 0).any()):
        raise FormatError(
            f"{file}: {THRESHOLD} holds negative values", why="negative features would pass, which no architecture here has", fix=RESTORE
        )
    return stored


def _beside(file: Path) -> dict[str, Any]:
    """The side channel, if there is one that can be read: the tensors mean the same without it."""
    side = file.with_suffix(".saehub.json")
    try:
        return {key: value for key, value in read_config(side).items() if key == SIDE_CHANNEL} if side.is_file() else {}
    except SaehubError:
        return {}


def _read_plainly(foreign: Foreign, config: dict[str, Any], layer: int, file: Path) -> SAE:
    from saehub.checkpoint.config import SAEConfig

    stored = foreign.tensors
    ours = {
        "W_enc": stored["W_enc"].T.contiguous(),
        **{name: stored[name] for name in ("b_enc", "W_dec", "b_dec", "W_skip") if name in stored},
    }
    if THRESHOLD in stored:
        ours["threshold"] = stored[THRESHOLD]
    d_sae, d = stored["W_enc"].shape
    kind = "skip_transcoder" if "W_skip" in stored else "transcoder"
    architecture = "jumprelu" if THRESHOLD in stored else "relu"
    about: dict[str, Any] = sites(*(_full(config.get(key), layer) for key in HOOKS))
    if isinstance(config.get("model_name"), str):
        about["model"] = {"name": config["model_name"]}
    about["origin"] = {"format": FORMAT, "config": json.loads(json.dumps(config, default=str)), "layer": layer}
    return build(file, SAEConfig(architecture, d, d_sae, kind=kind, subtract_b_dec=False), ours, about)


def _full(hook: Any, layer: int) -> str | None:
    return f"blocks.{layer}.{hook}" if isinstance(hook, str) and hook else None


# ---------------------------------------------------------------------- writing
def to_circuit_tracer(sae: SAE) -> tuple[int, Foreign]:
    """Layer, and config, tensors and side channel; raises Unsayable with the reason."""
    if sae.config.kind == "autoencoder":
        raise Unsayable("circuit-tracer holds transcoders, this is an autoencoder")
    if sae.config.d_in != sae.config.d_out:
        raise Unsayable(f"circuit-tracer's transcoders have one width, this one has {sae.config.d_in} and {sae.config.d_out}")
    foreign = fold_to_jumprelu(sae)
    layer, hooks = _hooks(sae.provenance)
    model = sae.provenance.get("model")
    config: dict[str, Any] = {"model_name": model["name"]} if isinstance(model, dict) and model.get("name") else {}
    config |= {"model_kind": "transcoder_set", **dict(zip(HOOKS, hooks, strict=True)), "scan": None}
    origin = sae.provenance.get("origin")
    if isinstance(origin, dict) and origin.get("format") == FORMAT and isinstance(origin.get("config"), dict):
        said = origin["config"]  # if it still names these very tensors, perhaps by another of their names
        ours, theirs = (sites(*(_full(source.get(key), layer) for key in HOOKS)) for source in (config, said))
        if ours == theirs and said.get("model_name") == config.get("model_name"):
            config = {key: value for key, value in said.items() if key != "transcoders"}
            foreign.dropped += [f"the list of files in {CONFIG}"] if "transcoders" in said else []
    t = foreign.tensors
    foreign.tensors = {"W_enc": t["W_enc"].T.contiguous(), **{name: t[name] for name in ("b_enc", "W_dec", "b_dec", "W_skip") if name in t}}
    if sae.config.architecture != "relu":
        if bool((t["threshold"] < 0).any()):
            foreign.folded.append("negative thresholds are 0 (the same features here, not in circuit-tracer)")
            foreign.bit_exact = [name for name in foreign.bit_exact if name != "threshold"]
        foreign.tensors[THRESHOLD] = t["threshold"].clamp(min=0)
    foreign.config = {**config, SIDE_CHANNEL: foreign.config[SIDE_CHANNEL]}
    return layer, foreign


def _hooks(provenance: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The layer, and both hooks without it; Unsayable where one is not known, or lies in another layer."""
    from saehub.sites import Site

    found: list[tuple[int, str]] = []
    for key, what in (("site", "reads"), ("target_site", "predicts")):
        name = provenance.get(f"unknown_{key}")
        if not name and provenance.get(key):
            try:
                site = Site.parse(str(provenance[key]))  # a bare module path could be anything in a model that is not at hand
                name = site.names(shape_of_family("llama"))["transformer_lens"] if site.kind else None
            except SaehubError:
                name = None
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name) if isinstance(name, str) else None
        if not match:
            raise Unsayable(
                f"circuit-tracer must know by a TransformerLens name what the transcoder {what}; {key} is {provenance.get(key)!r}"
            )
        found.append((int(match[1]), match[2]))
    if found[0][0] != found[1][0]:
        raise Unsayable(
            f"circuit-tracer's transcoders stay within a layer, this one reads layer {found[0][0]} and predicts layer {found[1][0]}"
        )
    return found[0][0], [hook for _, hook in found]
