"""A folder in; Sparsify runs that Sparsify itself trained and saved, and what it computes with every checkpoint in the folder, out.

Run in a process of its own (`python sparsify_writes.py FOLDER`): the library reads its environment when it is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"SPARSIFY_DISABLE_TRITON": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file, save_file

D, LATENTS, K = 16, 48, 6
SAE = {"num_latents": LATENTS, "k": K}
# run -> (settings of the sparse coder, hookpoints, other settings of the run)
RUNS = {
    "topk": ({"expansion_factor": 3, "k": K}, ["layers.0", "layers.1"], {}),
    "groupmax": ({**SAE, "activation": "groupmax"}, ["layers.1"], {"model": "nowhere/unknown"}),
    "multi_topk": ({**SAE, "multi_topk": True}, ["layers.0"], {}),
    "transcoder": ({**SAE, "transcode": True}, ["layers.1.mlp"], {"model": "builtin/tiny-llama"}),
    "skip": ({**SAE, "transcode": True, "skip_connection": True}, ["layers.1.mlp"], {"model": "builtin/tiny-llama"}),
    "skip_sae": ({**SAE, "skip_connection": True}, ["layers.1"], {}),
    "seeds": (SAE, ["layers.1"], {"init_seeds": [3, 5]}),
    "best": (SAE, ["layers.0", "layers.1"], {"save_best": True, "save_every": 2}),
    "adam": ({**SAE, "normalize_decoder": False}, ["layers.1"], {"optimizer": "adam", "lr": 1e-2, "lr_warmup_steps": 1}),
}


class Tokens(torch.utils.data.Dataset):
    """Random sequences of 16 tokens."""

    def __init__(self, count: int):
        self.ids = torch.randint(0, 50, (count, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index]}


def train(folder: Path) -> None:
    """Every run of RUNS, six steps each, by the library's trainer on a Llama with random weights."""
    from sparsify import SparseCoderConfig, Trainer
    from sparsify.__main__ import RunConfig
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(vocab_size=50, hidden_size=D, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    )
    for name, (sae, hookpoints, settings) in RUNS.items():
        cfg = RunConfig(
            SparseCoderConfig(**sae),
            batch_size=4,
            hookpoints=hookpoints,
            log_to_wandb=False,
            save_dir=str(folder),
            run_name=name,
            ctx_len=16,
            **settings,
        )
        Trainer(cfg, Tokens(24), model).fit()


def save_dtypes(folder: Path) -> None:
    """One in bfloat16 throughout, saved by the library."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(2)
    coder = SparseCoder(D, SparseCoderConfig(num_latents=LATENTS, k=K), dtype=torch.bfloat16)
    coder.b_dec.data.normal_()
    coder.save_to_disk(folder / "bfloat16" / "layers.0")


def compute(folder: Path) -> None:
    """`load_from_disk`, `encode`, `decode` and the skip path in float32 with every checkpoint, into truth.safetensors."""
    from sparsify import SparseCoder

    x_ND, found = load_file(folder / "rows.safetensors")["x"], {}
    for file in sorted(folder.rglob("cfg.json")):
        coder = SparseCoder.load_from_disk(file.parent).float()
        with torch.no_grad():
            values_NK, indices_NK, _ = coder.encode(x_ND)
            y_ND = coder.decode(values_NK, indices_NK)
            if coder.W_skip is not None:
                y_ND = y_ND + x_ND @ coder.W_skip.mT
        name = file.parent.relative_to(folder).as_posix()
        found |= {f"{name} f": torch.zeros(len(x_ND), coder.num_latents).scatter(1, indices_NK, values_NK), f"{name} y": y_ND}
    save_file(found, folder / "truth.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    train(target)
    save_dtypes(target)
    compute(target)
