"""A SAELens training checkpoint in; the config and tensors of the SAE that it is, with what SAELens keeps beside them folded in, out.

A training folder holds what the optimizer moved: decoder rows of any norm, `topk_threshold` as a float64 scalar, weights for activations
that a scaler had changed first. Its optimizer state (`trainer_state.pt`, a pickle) is never opened. What comes out is what SAELens' own
`TrainingSAE.load_from_disk`, then `fold_activation_…`, then `save_inference_model` compute, with decoder norms left unfolded:

    x s (expected_average_only_in):   W_enc s,  W_dec / s,  b_dec / s;   θ / s where θ is compared with p ‖W_dec_i‖
                                      matching pursuit:  b_dec / s,  residual_threshold / s
    (x - μ) M (covariance_whitening): M W_enc,  W_dec M⁻¹,  b_dec M⁻¹ + μ;   b_enc - μ M W_enc where b_dec is not subtracted;
                                      decoder norms folded before, because M⁻¹ changes them
    log_threshold (before version 6.5x):  θ = e^log_threshold

Products are taken in float64 and rounded once, to float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError
from saehub.jsonio import read_json
from saehub_saelens import legacy

if TYPE_CHECKING:
    from torch import Tensor

SCALER, WHITENING, STATE = "activation_scaler.json", "activation_whitening.safetensors", "trainer_state.pt"
ARCHITECTURES = {"batchtopk": ("batchtopk", "autoencoder"), "matryoshka_batchtopk": ("matryoshka", "autoencoder")}
"""SAELens' words that only training folders have -> (our architecture, our kind)."""
RESCALED = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
"""Those with `rescale_acts_by_decoder_norm`."""
INVERSE_TOLERANCE = 1e-6
"""Largest |M M⁻¹ - 1| of a whitening that is folded."""


@dataclass(frozen=True)
class Scaler:
    """What SAELens' trainer did to the activations before the SAE saw them."""

    factor: float | None = None
    """x s."""
    whitening: dict[str, Tensor] | None = None
    """`mean` [d_in], `matrix` and `inverse_matrix` [d_in, d_in]: (x - mean) matrix."""

    def to_json(self) -> dict[str, Any]:
        """For `origin`."""
        return {"scaling_factor": self.factor, "has_whitening": self.whitening is not None}


def is_training(path: Path, config: dict[str, Any]) -> bool:
    """Whether the folder holds training tensors: by its architecture, by a word that only training configs have, or by the files beside.

    Before version 6 training and inference folders were alike.
    """
    if str(config.get("architecture")) in ARCHITECTURES:
        return True
    beside = any((path / name).exists() for name in (SCALER, STATE))
    return legacy.is_version_6(config) and (beside or "decoder_init_norm" in config)


def read_scaler(path: Path, config: dict[str, Any]) -> Scaler:
    """`activation_scaler.json` and `activation_whitening.safetensors`; FormatError for broken ones and for what the config says is missing."""
    from saehub.checkpoint.format import read_tensors

    factor, whitening, file = None, None, path / SCALER
    if file.is_file():
        found = read_json(file)
        factor = found.get("scaling_factor") if isinstance(found, dict) else found
        if not isinstance(found, dict) or not (factor is None or _positive(factor)):
            raise FormatError(f"{file}: scaling_factor is {factor!r}", why="expected a positive number, or null")
        if found.get("has_whitening", True) and (path / WHITENING).is_file():
            whitening = read_tensors(path / WHITENING)
            _check_whitening(path / WHITENING, whitening, config.get("d_in"))
    norm = config.get("normalize_activations")
    wanted = {"expected_average_only_in": (factor, f"scaling_factor of {SCALER}"), "covariance_whitening": (whitening, WHITENING)}
    if norm in wanted and wanted[norm][0] is None:
        raise FormatError(
            f"a training checkpoint with normalize_activations {norm!r} and no {wanted[norm][1]}",
            why="the SAE was trained on activations changed by it, and nothing else in the folder says how",
            fix=f"restore {wanted[norm][1]} from where the checkpoint came, or save_inference_model in SAELens",
        )
    if factor is not None and norm in ("layer_norm", "constant_norm_rescale", "covariance_whitening"):
        raise FormatError(f"{file}: a scaling_factor beside normalize_activations {norm!r}", why="SAELens' trainer never uses both")
    if factor is not None and whitening is not None:
        raise FormatError(f"{file}: a scaling_factor beside a whitening", why="SAELens' trainer never uses both")
    return Scaler(factor, whitening)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_whitening(file: Path, whitening: dict[str, Tensor], d_in: Any) -> None:
    import torch

    expected = {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}
    shapes = {name: tuple(tensor.shape) for name, tensor in whitening.items()}
    if shapes != expected or not all(t.is_floating_point() and bool(t.isfinite().all()) for t in whitening.values()):
        raise FormatError(f"{file} holds {shapes}", why=f"expected finite numbers: {expected}")
    product = whitening["matrix"].double() @ whitening["inverse_matrix"].double()
    off = float((product - torch.eye(product.shape[0], dtype=torch.float64)).abs().max())
    if off > INVERSE_TOLERANCE:
        raise FormatError(
            f"{file}: inverse_matrix is not the inverse of matrix",
            why=f"their product is off by {off:.1e} (allowed {INVERSE_TOLERANCE:.0e}): folding it would give another SAE",
        )


def folds(config: dict[str, Any], scaler: Scaler, names: set[str]) -> list[str]:
    """What `prepare` changes, in words; `names` are the stored tensors'."""
    found = ["log_threshold into threshold = exp(log_threshold)"] if "log_threshold" in names else []
    if scaler.factor is not None:
        found.append(f"the activation scale {scaler.factor!r} of {SCALER}")
    if scaler.whitening is not None:
        if config.get("rescale_acts_by_decoder_norm") and config.get("architecture") in RESCALED:
            found.append("decoder norms into W_enc, b_enc and W_dec")
        found.append(f"the whitening of {WHITENING}")
    return found


def prepare(config: dict[str, Any], tensors: dict[str, Tensor], scaler: Scaler) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors (copies) in the words of an inference folder, but for `batchtopk` and `matryoshka_batchtopk`, which keep theirs
    with `threshold` a scalar and `group_sizes`."""
    import torch

    config, tensors, word = dict(config), dict(tensors), config.get("architecture")
    if word in RESCALED and not isinstance(config.get("rescale_acts_by_decoder_norm"), bool):
        raise FormatError(
            f"a {word} training checkpoint without rescale_acts_by_decoder_norm",
            why="it was written before the option existed, and SAELens has changed what its absence means",
            fix='add "rescale_acts_by_decoder_norm": false to cfg.json if it was trained without',
        )
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").double().exp().float()
    if "topk_threshold" in tensors and word in ARCHITECTURES:
        tensors["threshold"] = tensors.pop("topk_threshold")
    if word == "matryoshka_batchtopk":
        tensors["group_sizes"] = torch.tensor(_group_sizes(config), dtype=torch.int64)
    if scaler.factor is not None:
        _fold_factor(config, tensors, scaler.factor)
    if scaler.whitening is not None:
        _fold_whitening(config, tensors, scaler.whitening)
    if config.get("normalize_activations") in ("expected_average_only_in", "covariance_whitening"):
        config["normalize_activations"] = "none"
    return config, tensors


def _group_sizes(config: dict[str, Any]) -> list[int]:
    """Of nested widths, the last of which SAELens adds where it is not d_sae."""
    widths, d_sae = config.get("matryoshka_widths"), config.get("d_sae")
    whole = isinstance(widths, list) and all(isinstance(w, int) and not isinstance(w, bool) for w in widths) and isinstance(d_sae, int)
    ends = [*widths, *([d_sae] if not widths or widths[-1] != d_sae else [])] if whole else []
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if not sizes or min(sizes) < 1:
        raise FormatError(f"cfg.json: matryoshka_widths is {widths!r}", why=f"expected whole numbers that increase up to d_sae = {d_sae}")
    return sizes


def _fold_factor(config: dict[str, Any], tensors: dict[str, Tensor], s: float) -> None:
    if config["architecture"] == "matching_pursuit":
        factors = {"b_dec": 1 / s}
        config["residual_threshold"] = config.get("residual_threshold", 1e-2) / s
    else:
        factors = {"W_enc": s, "W_dec": 1 / s, "b_dec": 1 / s}
        if config["architecture"] in ARCHITECTURES and config["rescale_acts_by_decoder_norm"]:
            factors["threshold"] = 1 / s
    for name, factor in factors.items():
        if name in tensors:  # a missing one is the schema's to report
            tensors[name] = _rounded(tensors[name].double() * factor, tensors[name])


def _fold_whitening(config: dict[str, Any], tensors: dict[str, Tensor], whitening: dict[str, Tensor]) -> None:
    word = config["architecture"]
    missing = [name for name in ("W_enc", "W_dec", "b_dec") if name not in tensors]
    if word == "matching_pursuit" or missing:
        why = "its encoder is its decoder, which no whitening can be folded into" if not missing else f"missing: {', '.join(missing)}"
        raise FormatError(f"a {word} checkpoint with a whitening cannot be read", why=why)
    mean_D, matrix_DD, inverse_DD = (whitening[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    wide = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    touched = {"W_enc", "W_dec", "b_dec"}
    if word in RESCALED and config["rescale_acts_by_decoder_norm"]:
        norm_F = wide["W_dec"].norm(dim=1).clamp(min=1e-8)  # SAELens' own floor
        wide["W_enc"], wide["b_enc"], wide["W_dec"] = wide["W_enc"] * norm_F, wide["b_enc"] * norm_F, wide["W_dec"] / norm_F[:, None]
        touched.add("b_enc")
        config["rescale_acts_by_decoder_norm"] = False
    wide["W_enc"] = matrix_DD @ wide["W_enc"]
    if not config.get("apply_b_dec_to_input", True):  # else the new b_dec takes the mean off
        shift_F = mean_D @ wide["W_enc"]
        for name, shift in (("b_enc", shift_F), ("b_gate", shift_F), ("b_mag", shift_F * wide["r_mag"].exp() if "r_mag" in wide else shift_F)):
            if name in wide:
                wide[name] = wide[name] - shift
                touched.add(name)
    wide["W_dec"], wide["b_dec"] = wide["W_dec"] @ inverse_DD, wide["b_dec"] @ inverse_DD + mean_D
    for name in touched:
        tensors[name] = _rounded(wide[name], tensors[name])


def _rounded(wide: Tensor, stored: Tensor) -> Tensor:
    import torch

    return wide.to(torch.promote_types(stored.dtype, torch.float32))
