"""Folders that a library leaves on the way to a finished SAE, or left years ago; written with torch and safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saehub.testing.saes import D_IN, D_SAE, random_sae


@dataclass(frozen=True)
class Case:
    """As the published layouts' tests have it."""

    path: Path
    address: str


def _saelens(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], scale: float | None = None) -> Case:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    if scale is not None:
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    return Case(folder, "saelens/saelens")


def _training(architecture: str, norm: str = "none", **words: Any) -> dict[str, Any]:
    metadata = {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post"}
    common = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none"}
    return common | {"architecture": architecture, "normalize_activations": norm, "decoder_init_norm": 0.1, "metadata": metadata} | words


def saelens_batchtopk_in_training(folder: Path) -> Case:
    """Weights for activations times 0.37, decoder rows of any length, a float64 threshold, k that is not whole."""
    tensors = random_sae("batchtopk", seed=1).tensors()
    tensors["topk_threshold"] = tensors.pop("threshold").double().reshape(())
    words = {"k": 5.5, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}
    return _saelens(folder, tensors, _training("batchtopk", "expected_average_only_in", **words), 0.37)


def saelens_matryoshka_in_training(folder: Path) -> Case:
    """Nested widths, the last of which SAELens adds."""
    tensors = random_sae("matryoshka", seed=2).tensors()
    del tensors["group_sizes"]
    tensors["topk_threshold"] = tensors.pop("threshold").double().reshape(())
    words = {"k": 6, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01, "matryoshka_widths": [8, 20]}
    return _saelens(folder, tensors, _training("matryoshka_batchtopk", **words))


def saelens_jumprelu_with_log_threshold(folder: Path) -> Case:
    """As trainers stored thresholds until 2026."""
    tensors = random_sae("jumprelu", seed=3).tensors()
    tensors["log_threshold"] = tensors.pop("threshold").log()
    return _saelens(folder, tensors, _training("jumprelu", "expected_average_only_in", jumprelu_bandwidth=0.05), 2.5)


def saelens_flat_config(folder: Path) -> Case:
    """Version 3: no `metadata`, the activation by name, a scaling factor of ones."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}, "normalize_activations": "layer_norm", "apply_b_dec_to_input": False}  # fmt: skip
    return _saelens(folder, random_sae("topk", seed=4).tensors() | {"scaling_factor": torch.ones(D_SAE)}, config)


def sparsify_autoencoder_with_a_skip_path(folder: Path) -> Case:
    """`skip_connection` without `transcode`: the encoder subtracts b_dec, as no transcoder does."""
    t = random_sae("topk", kind="skip_transcoder", subtract_b_dec=False, seed=5).tensors()
    tensors = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"], "W_skip": t["W_skip"]}
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": 6, "multi_topk": True, "skip_connection": True, "transcode": False, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps(config))
    return Case(folder, "sparsify/sparsify")


def sparsify_of_2024(folder: Path) -> Case:
    """Few words, the width by its factor."""
    t = random_sae("topk", seed=6).tensors()
    save_file({"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"expansion_factor": 3, "normalize_decoder": True, "k": 6, "d_in": D_IN}))
    return Case(folder, "sparsify/sparsify")


def dictionary_learning_identity(folder: Path) -> Case:
    """No tensors at all: f = x."""
    torch.save({}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict", "activation_dim": D_IN, "layer": 1, "lm_name": "", "submodule_name": "resid_post_layer_1"}}))
    return Case(folder, "dictionary_learning/dictionary_learning")


def dictionary_learning_without_buffers(folder: Path) -> Case:
    """A TopK dictionary from before k and threshold were stored."""
    t = random_sae("topk", seed=7).tensors()
    torch.save({"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T.contiguous(), "b_dec": t["b_dec"]}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "activation_dim": D_IN, "dict_size": D_SAE, "k": 6}}))
    return Case(folder, "dictionary_learning/dictionary_learning")


CASES: dict[str, Callable[[Path], Case]] = {
    build.__name__: build
    for build in (
        saelens_batchtopk_in_training,
        saelens_matryoshka_in_training,
        saelens_jumprelu_with_log_threshold,
        saelens_flat_config,
        sparsify_autoencoder_with_a_skip_path,
        sparsify_of_2024,
        dictionary_learning_identity,
        dictionary_learning_without_buffers,
    )
}
