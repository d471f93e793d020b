"""A SAELens folder and rows in; what sae_lens itself computes out. The only module that imports sae_lens."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from saehub.capabilities import Library
from saehub.jsonio import read_json
from saehub_saelens.mapping import VERSION
from saehub_saelens.train_config import TRAINER
from saehub_saelens.training import SCALER, is_training

CHUNK_ROWS = 1024
LIBRARY = Library("sae_lens", "sae-lens", VERSION)
SEAMS = ("step", "maybe_reset_sparsity", "build_train_step_log_dict", "set_final_sae_metadata")
"""What the hub calls of `SAETrainer`: its own seams for whoever coordinates several trainers."""


def load(path: Path):
    """`SAE.load_from_disk` in float32 on the CPU. Rows are given flat, so the reshaping of attention heads is switched off."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")  # about models and hooks that are not used here
        SAE = LIBRARY.take("sae_lens:SAE", attributes=("load_from_disk",))
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
    TrainingSAE = LIBRARY.take("sae_lens:TrainingSAE", attributes=("load_from_disk", "save_inference_model"))
    ActivationScaler = LIBRARY.take("sae_lens.training.activation_scaler:ActivationScaler", attributes=("load",))
    sae, scaler = TrainingSAE.load_from_disk(path, device="cpu", dtype="float32"), ActivationScaler()
    if (path / SCALER).is_file():
        scaler.load(path / SCALER)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        w = scaler.whitening
        sae.fold_activation_whitening(mean=w.mean, whitening_matrix=w.matrix, unwhitening_matrix=w.inverse_matrix)
    sae.save_inference_model(into)


def training_classes(word: str, settings: Iterable[str]) -> tuple[Any, Any, Any, Any]:
    """SAELens' training SAE of that architecture with its config (which must take `settings`), and its `SAETrainer` with its config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_config = LIBRARY.take("sae_lens.config:SAETrainerConfig", parameters=TRAINER)
        sae_class, config_class = LIBRARY.take("sae_lens.registry:get_sae_training_class")(word)
        LIBRARY.take(f"{config_class.__module__}:{config_class.__qualname__}", parameters=settings)
        trainer = LIBRARY.take("sae_lens.training.sae_trainer:SAETrainer", parameters=("cfg", "sae", "data_provider"), attributes=SEAMS)
        LIBRARY.take("sae_lens.training.activation_scaler:ActivationScaler", attributes=("estimate_scaling_factor", "estimate_whitening"))
    return sae_class, config_class, trainer, trainer_config


def evaluation() -> Any:
    """`sae_lens.evals`, with `run_evals` and what it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LIBRARY.take("sae_lens.evals:run_evals", parameters=("sae", "activation_store", "model", "activation_scaler", "eval_config", "exclude_special_tokens"))
        LIBRARY.take("sae_lens.evals:EvalConfig", parameters=("batch_size_prompts", "n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches"))
        return LIBRARY.take("sae_lens.evals", attributes=("ActivationScaler", "get_featurewise_weight_based_metrics"))


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
