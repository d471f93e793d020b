"""A SAELens folder and rows in; what sae_lens itself computes out. The only module that imports sae_lens."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

CHUNK_ROWS = 1024


def load(path: Path):
    """`SAE.load_from_disk` in float32 on the CPU. Rows are given flat, so the reshaping of attention heads is switched off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about models and hooks that are not used here
        from sae_lens import SAE

        sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
    if sae.cfg.reshape_activations != "none":
        sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval()


def run(path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, d_sae] and reconstruction [n, d_out], the latter by `forward`: `decode` leaves a skip path out."""
    sae = load(path)
    features, reconstructions = [], []
    with torch.no_grad():
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            x_BD = x_ND[start : start + CHUNK_ROWS].float()
            features.append(sae.encode(x_BD))
            reconstructions.append(sae(x_BD))
    return torch.cat(features), torch.cat(reconstructions)
