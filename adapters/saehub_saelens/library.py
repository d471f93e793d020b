"""A SAELens folder and rows in; what sae_lens itself computes out. The only module that imports sae_lens."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from saehub.jsonio import read_json
from saehub_saelens.training import SCALER, is_training

CHUNK_ROWS = 1024


def load(path: Path):
    """`SAE.load_from_disk` in float32 on the CPU. Rows are given flat, so the reshaping of attention heads is switched off."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")  # about models and hooks that are not used here
        from sae_lens import SAE

        if _is_training(path):
            _to_inference(path, Path(scratch))
            path = Path(scratch)
        sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
    if sae.cfg.reshape_activations != "none":
        sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval()


def _is_training(path: Path) -> bool:
    with safe_open(path / "sae_weights.safetensors", framework="pt") as stream:
        old = "log_threshold" in stream.keys()  # noqa: SIM118
    return old or is_training(path, read_json(path / "cfg.json"))


def _to_inference(path: Path, into: Path) -> None:
    """A training checkpoint as SAELens itself makes an inference folder of it at the end of training: scale or whitening folded, then saved."""
    from sae_lens import TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    sae, scaler = TrainingSAE.load_from_disk(path, device="cpu", dtype="float32"), ActivationScaler()
    if (path / SCALER).is_file():
        scaler.load(path / SCALER)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        w = scaler.whitening
        sae.fold_activation_whitening(mean=w.mean, whitening_matrix=w.matrix, unwhitening_matrix=w.inverse_matrix)
    sae.save_inference_model(into)


def training_classes(word: str) -> tuple[Any, Any, Any, Any]:
    """SAELens' training SAE of that architecture with its config, and its `SAETrainer` with its config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.config import SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer
    return (*get_sae_training_class(word), SAETrainer, SAETrainerConfig)


def run(path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, d_sae] and reconstruction [n, d_out], the latter by `forward`: `decode` leaves a skip path and a temporal SAE's
    prediction out. A temporal SAE takes sequences [S, T, d_in] and gives [S, T, …]."""
    sae = load(path)
    features, reconstructions = [], []
    with torch.no_grad():
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            x_BD = x_ND[start : start + CHUNK_ROWS].float()
            features.append(sae.encode(x_BD))
            reconstructions.append(sae(x_BD))
    return torch.cat(features), torch.cat(reconstructions)
