"""A Sparsify folder and rows in; what sparsify itself computes out. The only module that imports sparsify."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from saehub.errors import CheckFailed

CHUNK_ROWS = 1024


def load(path: Path):
    """A `SparseCoder` in float32 on the CPU with the folder's config and tensors.

    As `SparseCoder.load_from_disk`, but for the dtype: that casts all tensors to the dtype of one of them, here every stored value is kept.
    """
    from safetensors.torch import load_model
    from sparsify import SparseCoder, SparseCoderConfig

    words = json.loads((path / "cfg.json").read_text())
    if words.get("signed"):
        raise CheckFailed(
            "the installed sparsify cannot compute this SAE",
            why="cfg.json says signed: true, a selection by absolute value that sparsify had until 2024-08-15 and ignores since",
            fix="--no-verify: read by the equation of that time (abstopk), the result says `unverified`",
        )
    d_in = words.pop("d_in")
    coder = SparseCoder(d_in, SparseCoderConfig.from_dict(words, drop_extra_fields=True), dtype=torch.float32)
    load_model(coder, str(path / "sae.safetensors"))
    return coder.eval()


def run(path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, d_sae] and reconstruction [n, d_in].

    `forward` on the CPU runs in float32 (its autocast is for CUDA) and is `encode`, `decode` and the skip path; with multi_topk it would
    return the reconstruction from 4k latents, a training aid, so the flag is put off.
    """
    coder = load(path)
    coder.cfg.multi_topk = False
    features, reconstructions = [], []
    with torch.no_grad():
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            x_BD = x_ND[start : start + CHUNK_ROWS].float()
            out = coder(x_BD)
            features.append(x_BD.new_zeros(x_BD.shape[0], coder.num_latents).scatter(1, out.latent_indices, out.latent_acts))
            reconstructions.append(out.sae_out)
    return torch.cat(features), torch.cat(reconstructions)
