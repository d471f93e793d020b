"""A Gemma Scope 2 folder (`config.json`, `params.safetensors`) in, an SAE out (Google DeepMind 2025, Gemma 3).

    resid_post/layer_13_width_16k_l0_medium/      in google/gemma-scope-2-{270m … 27b}-{pt,it}

| tensor | shape | here |
|---|---|---|
| w_enc | [d_in, d_sae] | W_enc |
| b_enc, threshold | [d_sae] | b_enc, threshold |
| w_dec | [d_sae, d_out] | W_dec |
| b_dec | [d_out] | b_dec |
| affine_skip_connection | [d_in, d_out] | W_skip, transposed |

    p = x w_enc + b_enc;   f = [p > θ] max(p, 0);   x̂ = f w_dec + b_dec  (+ x affine_skip_connection)

config.json: architecture (`jump_relu`), type (`sae`, `transcoder`), model_name, hf_hook_point_in, hf_hook_point_out, affine_connection,
width, l0. Some folders have none; the tensors alone then say what they can. Cross-layer transcoders (w_dec [d_sae, layers, d_out]) and
crosscoders are refused: summing their decoders would be another dictionary. Sources: the model card, SAELens' and circuit-tracer's loaders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, check_shapes, read_config
from saehub.errors import FormatError
from saehub_formats.common import ReadOnly, build, combine, multiply, sites
from saehub_formats.files import safetensors_names

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT, CONFIG, WEIGHTS = "gemma_scope_2", "config.json", "params.safetensors"
NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
SKIP = "affine_skip_connection"


class GemmaScope2(ReadOnly):
    """The exporter `gemma_scope_2`."""

    publication = "Gemma Scope 2"

    def sniff(self, path: Path) -> bool:
        """A params.safetensors with the five tensors."""
        return safetensors_names(Path(path) / WEIGHTS) >= NAMES.keys()

    def read(self, path: Path) -> SAE:
        """The SAE, tensors bit-exact (W_skip transposed); FormatError for damage, and for what is not one layer's dictionary."""
        from saehub.checkpoint.config import SAEConfig
        from saehub.checkpoint.format import read_tensors

        path = Path(path)
        config = read_config(path / CONFIG) if (path / CONFIG).is_file() else {}
        if config.get("architecture", "jump_relu") != "jump_relu" or config.get("type", "sae") not in ("sae", "transcoder"):
            said = f"architecture {config.get('architecture')!r}, type {config.get('type')!r}"
            raise FormatError(
                f"{path / CONFIG} says {said}",
                why="readable: jump_relu; sae and transcoder",
                fix="only a dictionary of one layer is an SAE here",
            )
        tensors = read_tensors(path / WEIGHTS)
        d_in, d_sae, d_out = _sizes(path / WEIGHTS, tensors)
        shapes = {
            "w_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "w_dec": (d_sae, d_out),
            "b_dec": (d_out,),
            "threshold": (d_sae,),
            SKIP: (d_in, d_out),
        }
        check_shapes(path / WEIGHTS, tensors, shapes, optional=(SKIP,))
        skip = SKIP in tensors
        if "affine_connection" in config and bool(config["affine_connection"]) != skip:
            raise FormatError(
                f"{path}: {CONFIG} says affine_connection {config['affine_connection']!r}",
                why=f"{WEIGHTS} has {'a' if skip else 'no'} {SKIP}",
                fix=RESTORE,
            )
        hook, target = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
        crosses = skip or d_in != d_out or config.get("type") == "transcoder" or (target and hook and target != hook)
        kind = "skip_transcoder" if skip else "transcoder" if crosses else "autoencoder"
        ours = {NAMES[name]: tensor for name, tensor in tensors.items() if name in NAMES}
        if skip:
            ours["W_skip"] = tensors[SKIP].T.contiguous()
        about: dict[str, Any] = sites(_text(hook), _text(target) if crosses else None, family="gemma2")
        if _text(config.get("model_name")):
            about["model"] = {"name": config["model_name"]}
        about["origin"] = {"format": FORMAT, "config": config}
        return build(path / WEIGHTS, SAEConfig("jumprelu", d_in, d_sae, d_out=d_out, kind=kind, subtract_b_dec=False), ours, about)

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d_out] of rows [n, d_in]: the published equation in float64, rounded once."""
        from saehub.checkpoint.format import read_tensors

        stored = read_tensors(Path(path) / WEIGHTS)
        p_NF = multiply(x_ND, stored["w_enc"]) + stored["b_enc"].double()
        f_NF = p_NF.clamp(min=0) * (p_NF > stored["threshold"].double())
        y_ND = combine(f_NF, stored["w_dec"]) + stored["b_dec"].double()
        if SKIP in stored:
            y_ND = y_ND + multiply(x_ND, stored[SKIP])
        return f_NF.float(), y_ND.float()


def _sizes(file: Path, tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    encoder, decoder = tensors.get("w_enc"), tensors.get("w_dec")
    if encoder is None or decoder is None or encoder.ndim != 2 or decoder.ndim != 2:
        shown = {name: list(tensor.shape) for name, tensor in tensors.items()}
        why = (
            "w_enc and w_dec of one layer are matrices; a cross-layer transcoder writes to several layers"
            if decoder is not None
            else "w_enc or w_dec is missing"
        )
        raise FormatError(f"{file} holds {shown}", why=why, fix="only a dictionary of one layer is an SAE here")
    return encoder.shape[0], encoder.shape[1], decoder.shape[1]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
