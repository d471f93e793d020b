"""A Sparsify folder and rows in; what sparsify itself computes out; and its training code. The only module that imports sparsify."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehub.capabilities import Library
from saehub.errors import CheckFailed

CHUNK_ROWS = 1024
LIBRARY = Library("sparsify", "eai-sparsify", "1.3.3")
TRAINER_STATE = ("saes", "optimizers", "lr_schedulers", "num_tokens_since_fired", "global_step", "fit")
"""What the adapter reads of a Trainer; checked on every one that is made."""
_TRAIN_SETTINGS = (
    "sae", "batch_size", "loss_fn", "optimizer", "lr", "lr_warmup_steps", "auxk_alpha", "dead_feature_threshold", "k_decay_steps", "micro_acc_steps",
    "exclude_tokens", "hookpoints", "init_seeds", "finetune", "save_every", "log_to_wandb",
)  # fmt: skip
_CODER_SETTINGS = ("activation", "num_latents", "k", "multi_topk", "normalize_decoder", "transcode", "skip_connection")


@dataclass(frozen=True)
class Training:
    """The library's classes that training needs."""

    trainer: type
    train_config: Any
    coder_config: Any


def training() -> Training:
    """Its Trainer and settings, ready for a step-by-step fit(); MissingDependency that names both versions if one is not as expected."""
    from saehub_sparsify.replay import Bar

    trainer = LIBRARY.take("sparsify.trainer:Trainer", parameters=("cfg", "dataset", "model"), attributes=("fit",))
    coder_config = LIBRARY.take("sparsify:SparseCoderConfig", parameters=_CODER_SETTINGS)
    train_config = LIBRARY.take("sparsify:TrainConfig", parameters=_TRAIN_SETTINGS)
    module = LIBRARY.take("sparsify.trainer", attributes=("tqdm",))
    module.tqdm = Bar
    coder = LIBRARY.take("sparsify.sparse_coder", attributes=("decoder_impl", "ForwardOutput"))
    LIBRARY.has(coder.ForwardOutput, "ForwardOutput", "fvu", "auxk_loss", "multi_topk_fvu", "latent_acts")
    coder.decoder_impl = decode
    return Training(trainer, train_config, coder_config)


def decode(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """The library's sparse decoder: its Triton kernel where the rows are on a GPU and the kernel takes that width, else its eager one.

    The library itself chooses once, at import, by whether triton is installed; the kernel wants the latents in multiples of 8.
    """
    from sparsify import utils

    kernel = top_acts.is_cuda and W_dec.shape[-1] % 8 == 0 and hasattr(utils, "xformers_embedding_bag")
    return (utils.triton_decode if kernel else utils.eager_decode)(top_indices, top_acts, W_dec)


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
