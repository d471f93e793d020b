"""A folder in; dictionaries that dictionary_learning itself trained and saved, and what it computes with every one in the folder, out.

Run in a process of its own (`python dictionary_learning_writes.py FOLDER`): the library brings nnsight, which changes torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file, save_file

D, LATENTS, K, STEPS = 16, 48, 6, 12
COMMON = {
    "steps": STEPS,
    "activation_dim": D,
    "dict_size": LATENTS,
    "layer": 3,
    "lm_name": "builtin/tiny-llama",
    "device": "cpu",
    "seed": 0,
}
TOPK = {"k": K, "warmup_steps": 2, "threshold_start_step": 2, "submodule_name": "resid_post_layer_3"}
ANNEAL = {"warmup_steps": 2, "sparsity_warmup_steps": 2, "anneal_start": 20, "sparsity_function": "Lp^p"}
TRAINERS = {
    "standard": ("StandardTrainer", {"warmup_steps": 2, "sparsity_warmup_steps": 2}),
    "april": ("StandardTrainerAprilUpdate", {"warmup_steps": 2, "sparsity_warmup_steps": 2}),
    "topk": ("TopKTrainer", TOPK),
    "batchtopk": ("BatchTopKTrainer", TOPK),
    "matryoshka": ("MatryoshkaBatchTopKTrainer", {**TOPK, "group_fractions": [0.25, 0.75]}),
    "jumprelu": ("JumpReluTrainer", {"warmup_steps": 2, "sparsity_warmup_steps": 2, "target_l0": 4.0}),
    "gated": ("GatedSAETrainer", {"warmup_steps": 2, "sparsity_warmup_steps": 2}),
    "panneal": ("PAnnealTrainer", ANNEAL),
    "gated_anneal": ("GatedAnnealTrainer", ANNEAL),
}


def trainer_class(name: str) -> type:
    """By name, from whichever module of the library has it."""
    from importlib import import_module

    for module in ("standard", "top_k", "batch_top_k", "matryoshka_batch_top_k", "jumprelu", "gdm", "p_anneal", "gated_anneal"):
        found = getattr(import_module(f"dictionary_learning.trainers.{module}"), name, None)
        if found is not None:
            return found
    raise LookupError(name)


def rows():
    """Batches of [64, D] with a mean, without end."""
    draw = torch.Generator().manual_seed(5)
    mean_D = torch.randn(D, generator=draw)
    while True:
        yield 3 * torch.randn(64, D, generator=draw) + mean_D


def train(folder: Path, normalize: bool) -> None:
    """Every trainer by the library's own loop: `RUN/trainer_<i>/{config.json, ae.pt, checkpoints/ae_5.pt}`, moved to its name."""
    from dictionary_learning.training import trainSAE

    for name, (trainer, settings) in TRAINERS.items():
        config = {"trainer": trainer_class(trainer), **COMMON, **settings}
        trainSAE(
            rows(),
            [config],
            steps=STEPS,
            save_dir=str(folder / f"run_{name}"),
            save_steps=[5],
            device="cpu",
            normalize_activations=normalize,
        )
        (folder / f"run_{name}" / "trainer_0").rename(folder / name)


def save(folder: Path, dictionary, config: dict, state: dict | None = None) -> None:
    """What the library's loop writes, for a class that no trainer makes."""
    folder.mkdir(parents=True)
    torch.save(dictionary.state_dict() if state is None else state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"layer": 3, "lm_name": "", **config}}))


def others(folder: Path) -> None:
    """Classes without a trainer, half precision, an old file, and a backup as the git version writes it."""
    from dictionary_learning.dictionary import AutoEncoderNew, IdentityDict

    torch.manual_seed(7)
    new = AutoEncoderNew(D, LATENTS)
    new.decoder.bias.data.normal_()
    new.encoder.bias.data.normal_()
    save(folder / "new", new, {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": LATENTS})
    save(folder / "identity", IdentityDict(D), {"dict_class": "IdentityDict", "activation_dim": D})
    for name in ("topk", "batchtopk", "jumprelu", "gated"):
        config = json.loads((folder / "plain" / name / "config.json").read_text())["trainer"]
        state = torch.load(folder / "plain" / name / "ae.pt", weights_only=True)
        half = {key: value.bfloat16() if value.is_floating_point() and key != "threshold" else value for key, value in state.items()}
        save(folder / "half" / name, None, config, half)
    topk = torch.load(folder / "plain" / "topk" / "ae.pt", weights_only=True)
    config = json.loads((folder / "plain" / "topk" / "config.json").read_text())["trainer"]
    save(folder / "old", None, config, {key: value for key, value in topk.items() if key not in ("k", "threshold")})
    batch = trainer_class("BatchTopKTrainer")(**COMMON, **TOPK)
    for step, x in zip(range(8), rows()):
        batch.update(step, x / 12.5)
    backup = {
        "step": 8,
        "ae": batch.ae.state_dict(),
        "optimizer": batch.optimizer.state_dict(),
        "config": batch.config,
        "norm_factor": 12.5,
    }
    save(folder / "backup", None, batch.config, backup)


def loaded(folder: Path):
    """By the library's own loader; AutoEncoder without its rescaling, and what it cannot load, by hand with its own classes and methods."""
    from dictionary_learning.dictionary import AutoEncoder, IdentityDict
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    config = json.loads((folder / "config.json").read_text())["trainer"]
    if config["dict_class"] == "IdentityDict":
        return IdentityDict(config["activation_dim"])
    if config["dict_class"] == "AutoEncoder":
        return AutoEncoder.from_pretrained(str(folder / "ae.pt"), normalize_decoder=False)
    if folder.name == "old":
        made = AutoEncoderTopK(D, LATENTS, K)
        made.load_state_dict(torch.load(folder / "ae.pt", weights_only=True), strict=False)
        return made
    if folder.name == "backup":
        found = torch.load(folder / "ae.pt", weights_only=True)
        made = BatchTopKSAE(D, LATENTS, K)
        made.load_state_dict(found["ae"])
        made.scale_biases(found["norm_factor"])
        return made
    return load_dictionary(str(folder), "cpu")[0]


def compute(folder: Path) -> None:
    """`encode` and `decode` in float32 with every dictionary, into truth.safetensors."""
    x_ND, found = load_file(folder / "rows.safetensors")["x"], {}
    for file in sorted(folder.rglob("ae.pt")):
        dictionary = loaded(file.parent)
        name = file.parent.relative_to(folder).as_posix()
        with torch.no_grad():
            f_NF = dictionary.encode(x_ND.clone())
            found |= {f"{name} f": f_NF.clone(), f"{name} y": dictionary.decode(f_NF).clone()}
    save_file(found, folder / "truth.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    train(target / "plain", normalize=False)
    train(target / "normalized", normalize=True)
    others(target)
    compute(target)
