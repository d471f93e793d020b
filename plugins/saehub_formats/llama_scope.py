"""A Llama Scope or Llamascopium folder in, an SAE for raw activations out (He et al. 2024, arXiv 2410.20526; OpenMOSS Language-Model-SAEs).

| | 2024 (Llama Scope) | 2025 (R1-Distill) | 2026 (Llamascopium) | here |
|---|---|---|---|---|
| config | hyperparams.json | config.json | config.json | origin |
| weights | checkpoints/final.safetensors | sae_weights.safetensors | sae_weights.safetensors | |
| encoder | encoder.weight [d_sae, d], encoder.bias | the same | W_E [d, d_sae], b_E | W_enc [d, d_sae], b_enc |
| decoder | decoder.weight [d, d_sae], decoder.bias | the same | W_D [d_sae, d], b_D | W_dec [d_sae, d], b_dec |
| θ | jump_relu_threshold, a number in the config | log_jumprelu_threshold | activation_function.log_jumprelu_threshold | threshold |
| norms | dataset_average_activation_norm {in, out} | as in 2026; where absent, add {in, out} | tensors dataset_average_activation_norm.HOOK | folded |

With s = √d / (average norm of the dataset's rows), in and out, and n_i = ‖W_dec_i‖ if `sparsity_include_decoder_norm`, else 1:

    2025, 2026:  p = s_in x W_E + b_E;  g = gate(n p);  f = p g;  x̂ = (f W_D + b_D) / s_out       gate: n p > 0, n p > e^{log θ}, or top-k
    2024:        W' = W_D s_in/s_out, n' = ‖W'‖;  p = n' (x W_E + b_E/s_in);  f = gate(p) p;  x̂ = f W'/n' + b_D/s_out

so in 2024 θ is in raw units, and later in those of normalised rows. Features are in raw units (f / s_in), as the library's own `inference`
mode gives them: W_enc stays as stored, b_enc / s_in, W_dec s_in/s_out, b_dec / s_out, and after 2024 θ / (n s_in). Only where the k largest n p
are chosen, or in 2024, does `decoder_norm_scaling` stay, and features are n f: the quantity that competes. `token-wise` norms are
constant_norm_rescale. 16-bit tensors that are folded become float32. Sources: src/lm_saes/sae.py at the time of each release,
src/llamascopium/models/{sae,sparse_dictionary}.py, SAELens' loaders (which agree on the units of θ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, check_shapes, is_map_with, read_config, whole_number
from saehub.errors import FormatError, did_you_mean
from saehub_formats.common import ReadOnly, build, combine, keep_largest, multiply, sites

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT = "llama_scope"
CONFIGS = ("hyperparams.json", "config.json")
WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
NORM = "dataset_average_activation_norm"
OURS = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec", "log_jumprelu_threshold": "log_threshold",
    "W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec", "activation_function.log_jumprelu_threshold": "log_threshold",
}  # fmt: skip


@dataclass
class Folder:
    """A folder, checked and renamed but not folded."""

    weights: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    activation: str
    early: bool
    """The equation of 2024."""
    transcoder: bool
    token_wise: bool
    scale_in: float
    scale_out: float
    with_norms: bool
    subtract: bool
    added: list[str] = field(default_factory=list)


class LlamaScope(ReadOnly):
    """The exporter `llama_scope`."""

    publication = "the folders of Llama Scope and Llamascopium"

    def sniff(self, path: Path) -> bool:
        """A config of that library beside its weights."""
        path = Path(path)
        try:
            known = any(
                is_map_with(path / name, {"d_model", "act_fn"}) or is_map_with(path / name, {"d_model", "sae_type"}) for name in CONFIGS
            )
            return known and any((path / name).is_file() for name in WEIGHTS)
        except OSError:
            return False

    def read(self, path: Path) -> SAE:
        """The SAE in raw units; FormatError for damage, unknown norms, and what is not row by row (batch-wise norms, batchtopk)."""
        from saehub.checkpoint.config import SAEConfig

        source = _open(Path(path))
        tensors, folded = dict(source.tensors), list(source.added)
        _fold_threshold(source, tensors, folded)
        factors = {"b_enc": 1 / source.scale_in, "b_dec": 1 / source.scale_out, "W_dec": source.scale_in / source.scale_out}
        for name, factor in factors.items():
            if factor != 1:
                tensors[name] = _rounded(tensors[name].double() * factor, tensors[name])
                folded.append(f"{name} times {factor!r}")
        norm = "constant_norm_rescale" if source.token_wise else "none"
        config = SAEConfig(
            source.activation,
            d_in=tensors["W_enc"].shape[0],
            d_sae=tensors["W_enc"].shape[1],
            params={"k": _whole(source.config, "top_k", Path(path))} if source.activation == "topk" else {},
            kind="transcoder" if source.transcoder else "autoencoder",
            norm_in=norm,
            norm_out=norm,
            subtract_b_dec=source.subtract,
            decoder_norm_scaling=source.with_norms and (source.early or source.activation == "topk"),
        )
        about: dict[str, Any] = sites(source.config["hook_point_in"], source.config["hook_point_out"] if source.transcoder else None)
        origin: dict[str, Any] = {"format": FORMAT, "config": source.config, "folded": folded}
        if config.decoder_norm_scaling and not source.early:
            origin["units"] = "features are the library's times the norm of the decoder row"
        return build(source.weights, config, tensors, {**about, "origin": origin})

    def folds(self, path: Path) -> list[str]:
        """What `read` folds: stands in the certificate of a conversion."""
        return self.read(path).provenance["origin"]["folded"]

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] in the units of `read`, reconstruction [n, d]: the published equations in float64, rounded once."""
        source = _open(Path(path))
        f_NF, y_ND = (_run_early if source.early else _run_late)(source, x_ND.double())
        return f_NF.float(), y_ND.float()


# ---------------------------------------------------------------------- reading
def _open(path: Path) -> Folder:
    from saehub.checkpoint.format import read_tensors

    name = next((name for name in CONFIGS if (path / name).is_file()), None)
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if name is None or weights is None:
        raise FormatError(
            f"{path} holds no {' or '.join(CONFIGS)}, or none of {', '.join(WEIGHTS)}",
            fix=f"{RESTORE}; .pt and .dcp weights: save_pretrained in Llamascopium",
        )
    config, stored = read_config(path / name), read_tensors(weights)
    _refuse(path / name, config)
    norms = {
        key.removeprefix(NORM + "."): float(stored.pop(key))
        for key in list(stored)
        if key.startswith(NORM + ".") and stored[key].numel() == 1
    }
    tensors, added = {OURS.get(key, key): tensor for key, tensor in stored.items()}, []
    for matrix, key in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")):
        if key in stored:
            tensors[matrix] = stored[key].T.contiguous()
    d = _whole(config, "d_model", path / name)
    d_sae = tensors["W_enc"].shape[-1] if "W_enc" in tensors else 0
    activation, early = config.get("act_fn", "relu").lower(), "jump_relu_threshold" in config
    if early and activation == "topk" and config["jump_relu_threshold"] > 0:  # as the library itself decides when it loads one
        activation = "jumprelu"
    if not config.get("use_decoder_bias", True) and "b_dec" not in tensors and "W_dec" in tensors:
        tensors["b_dec"] = tensors["W_dec"].new_zeros(d)
        added.append("b_dec = 0 (use_decoder_bias is false)")
    expected = {"W_enc": (d, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d), "b_dec": (d,)}
    check_shapes(weights, tensors, expected | ({"log_threshold": (d_sae,)} if activation == "jumprelu" and not early else {}))
    transcoder = config["hook_point_out"] != config["hook_point_in"]
    mode = config.get("norm_activation", "dataset-wise")
    scale_in, scale_out = _scales(path / name, config, norms, d) if mode == "dataset-wise" else (1.0, 1.0)
    subtract = bool(config.get("apply_decoder_bias_to_pre_encoder", False)) and bool(config.get("use_decoder_bias", True))
    if transcoder and (mode == "token-wise" or subtract):
        why = (
            "the output's norm cannot be known from the input"
            if mode == "token-wise"
            else "its decoder bias lives at another site than its input"
        )
        raise FormatError(
            f"{path / name}: a transcoder with {'token-wise norms' if mode == 'token-wise' else 'apply_decoder_bias_to_pre_encoder'}",
            why=why,
            fix="no architecture here computes it",
        )
    if subtract and scale_in != scale_out:
        raise FormatError(f"{path / name}: apply_decoder_bias_to_pre_encoder with two norms for one site", fix=RESTORE)
    with_norms = bool(config.get("sparsity_include_decoder_norm", True))
    return Folder(
        weights, config, tensors, activation, early, transcoder, mode == "token-wise", scale_in, scale_out, with_norms, subtract, added
    )


def _refuse(file: Path, config: dict[str, Any]) -> None:
    """What is another kind of dictionary, or not a function of one row."""
    for key, known, why in (
        ("sae_type", ("sae",), "crosscoders, cross-layer transcoders, Lorsa and MOLT have no equation here"),
        ("act_fn", ("relu", "topk", "jumprelu"), "batchtopk depends on the batch: convert it to jumprelu in Llamascopium first"),
        ("norm_activation", ("dataset-wise", "token-wise", "inference"), "a norm over the batch is not a function of one row"),
        ("use_glu_encoder", (False,), "a gated linear encoder has no equation here"),
    ):
        word = config.get(key, known[0])
        if (word.lower() if isinstance(word, str) else word) not in known:
            raise FormatError(
                f"{file}: {key} {word!r} cannot be read{did_you_mean(str(word), map(str, known))}",
                why=why,
                fix=f"readable: {', '.join(map(str, known))}",
            )
    for key in ("hook_point_in", "hook_point_out"):
        if not isinstance(config.get(key), str) or not config[key]:
            raise FormatError(f"{file}: {key} is {config.get(key)!r}", why="expected a name such as blocks.15.hook_resid_post", fix=RESTORE)
    theta = config.get("jump_relu_threshold", 0.0)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta < math.inf:
        raise FormatError(f"{file}: jump_relu_threshold is {theta!r}", why="expected a number from 0", fix=RESTORE)


def _whole(config: dict[str, Any], key: str, where: Path) -> int:
    try:
        return whole_number(config, key, str(where))
    except FormatError as error:
        error.fix = error.fix or RESTORE
        raise


def _scales(file: Path, config: dict[str, Any], norms: dict[str, float], d: int) -> tuple[float, float]:
    """√d over the average norms of the dataset, in and out."""
    said = config.get(NORM) if isinstance(config.get(NORM), dict) else {}
    found = []
    for side in ("in", "out"):
        hook = config[f"hook_point_{side}"]
        value = norms.get(hook, said.get(hook, said.get(side)))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise FormatError(
                f"{file.parent}: the average norm of the dataset at {hook} is {value!r}",
                why="norm_activation is dataset-wise, and without that number the dictionary does not fit any activation",
                fix=f'add "{NORM}": {{"in": …, "out": …}} to {file.name} (SAELens lists norm_scaling_factor = √d / norm for published ones)',
            )
        found.append(math.sqrt(d) / value)
    return found[0], found[1]


def _fold_threshold(source: Folder, tensors: dict[str, Tensor], folded: list[str]) -> None:
    """θ for every latent, in the units of the pre-activation that `read`'s SAE compares it with."""
    import torch

    if source.activation != "jumprelu":
        return
    if source.early:
        tensors["threshold"] = torch.full((tensors["W_enc"].shape[1],), float(source.config["jump_relu_threshold"]), dtype=torch.float32)
        folded.append("one jump_relu_threshold for every latent")
        return
    theta_F = tensors.pop("log_threshold").double().exp() / source.scale_in
    folded.append(f"threshold = exp(log_jumprelu_threshold) / {source.scale_in!r}" + (" / ‖W_dec_i‖" if source.with_norms else ""))
    if source.with_norms:
        theta_F = theta_F / tensors["W_dec"].double().norm(dim=1)  # a zero row never passes: θ is infinite
    tensors["threshold"] = theta_F.float()


def _rounded(product: Tensor, like: Tensor) -> Tensor:
    import torch

    return product.to(torch.promote_types(like.dtype, torch.float32))


# ---------------------------------------------------------------------- running
def _run_late(source: Folder, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The equation since 2025, in the units of normalised rows; features are then told in raw ones."""
    t, d = source.tensors, x_ND.shape[1]
    into_N1 = d**0.5 / x_ND.norm(dim=1, keepdim=True) if source.token_wise else source.scale_in
    out_N1 = into_N1 if source.token_wise else source.scale_out
    xn_ND = x_ND * into_N1 - (t["b_dec"].double() if source.subtract else 0)
    p_NF = multiply(xn_ND, t["W_enc"]) + t["b_enc"].double()
    n_F = t["W_dec"].double().norm(dim=1) if source.with_norms else 1.0
    if source.activation == "topk":
        f_NF = keep_largest(p_NF, source.config["top_k"], (p_NF * n_F).clamp(min=0))
    else:
        f_NF = p_NF * (p_NF * n_F > (t["log_threshold"].double().exp() if source.activation == "jumprelu" else 0))
    y_ND = (combine(f_NF, t["W_dec"]) + t["b_dec"].double()) / out_N1
    raw_NF = f_NF if source.token_wise else f_NF / source.scale_in
    return (raw_NF * n_F * (source.scale_in / source.scale_out) if source.activation == "topk" else raw_NF), y_ND


def _run_early(source: Folder, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The equation of 2024: norms are folded when the library loads it, then decoder rows are made unit vectors."""
    t, d = source.tensors, x_ND.shape[1]
    into_N1 = d**0.5 / x_ND.norm(dim=1, keepdim=True) if source.token_wise else 1.0
    b_D = t["b_dec"].double() / source.scale_out
    decoder_FD = t["W_dec"].double() * (source.scale_in / source.scale_out)
    n_F = decoder_FD.norm(dim=1) if source.with_norms else 1.0
    p_NF = (multiply(x_ND * into_N1 - (b_D if source.subtract else 0), t["W_enc"]) + t["b_enc"].double() / source.scale_in) * n_F
    if source.activation == "topk":
        f_NF = keep_largest(p_NF, source.config["top_k"])
    else:
        f_NF = p_NF * (p_NF > (source.config["jump_relu_threshold"] if source.activation == "jumprelu" else 0))
    unit_FD = decoder_FD / n_F[:, None].clamp(min=1e-300) if source.with_norms else decoder_FD
    return f_NF, (f_NF @ unit_FD + b_D) / into_N1
