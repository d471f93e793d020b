"""A folder with recorded rows in; what dictionary_learning itself makes of them, driven directly and without saehub, out.

Run in a process of its own (`python dictionary_learning_drives.py FOLDER`): the library brings nnsight, which changes torch.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from importlib import import_module
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file, save_file

PACKAGE = "dictionary_learning.trainers."
CLASSES = {
    "standard": "standard:StandardTrainer",
    "standard_april": "standard:StandardTrainerAprilUpdate",
    "topk": "top_k:TopKTrainer",
    "batch_topk": "batch_top_k:BatchTopKTrainer",
    "matryoshka_batch_topk": "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer",
    "jump_relu": "jumprelu:JumpReluTrainer",
    "gated": "gdm:GatedSAETrainer",
    "p_anneal": "p_anneal:PAnnealTrainer",
    "gated_anneal": "gated_anneal:GatedAnnealTrainer",
}
SIZES = {"steps": 40, "activation_dim": 32, "dict_size": 64, "layer": 0, "lm_name": "", "device": "cpu"}


def trainer_class(name: str) -> type:
    module, _, cls = CLASSES[name].partition(":")
    return getattr(import_module(PACKAGE + module), cls)


def train(folder: Path, jobs: dict) -> dict:
    """Each trainer on the recorded rows divided by the norm, then its own `scale_biases`; the dictionaries, by name."""
    given = load_file(folder / "rows.safetensors")
    norm = (given["calibration"].double() ** 2).sum(1).mean().sqrt().item()
    made = {}
    for name, job in jobs.items():
        torch.manual_seed(job["seed"])
        trainer = trainer_class(name)(**SIZES, seed=job["seed"], **job["settings"])
        if "dead_after" in job:
            trainer.dead_feature_threshold = job["dead_after"]
        for step, x_BD in enumerate(given["x"].split(job["batch"])):
            trainer.update(step, x_BD.clone() / norm if job["normalize"] else x_BD.clone())
        if job["normalize"]:
            trainer.ae.scale_biases(norm)
        made[name] = trainer.ae
        save_file({key: value.detach().contiguous() for key, value in trainer.ae.state_dict().items()}, folder / f"{name}.safetensors")
    return made


def evaluate(folder: Path, spec: dict, made: dict) -> dict:
    """The library's evaluate and loss_recovered on rows and tokens of a dataset, with its own dictionary."""
    from dictionary_learning.evaluation import evaluate, loss_recovered
    from nnsight import LanguageModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = load_file(folder / "dataset.safetensors")
    batches = [x_BD for x_BD in given["x"].split(spec["batch"]) if x_BD.shape[0] == spec["batch"]]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # its id is beyond every id of the text
    hf = AutoModelForCausalLM.from_pretrained(spec["model"], attn_implementation="eager").eval()
    model = LanguageModel(hf, tokenizer=tokenizer)
    found = {}
    for name in spec["saes"]:
        numbers = evaluate(made[name], iter(batches), n_batches=len(batches))
        with torch.no_grad():
            parts = [
                [float(v) for v in loss_recovered(text, model, model.model.layers[0], made[name])] for text in given["tokens"].split(spec["sequences"])
            ]
        for index, key in enumerate(("loss_original", "loss_reconstructed", "loss_zero")):
            numbers[key] = sum(part[index] for part in parts) / len(parts)
        numbers["frac_recovered"] = sum((r - z) / (o - z) for o, r, z in parts) / len(parts)
        found[name] = numbers
    return found


def extract(folder: Path) -> dict:
    """The largest relative difference of nnsight's rows from saehub's own reader, at every site of three families; and hooks left behind."""
    from saehub.activations import taps
    from saehub.errors import UsageError
    from saehub.sites import KINDS, Site
    from saehub.testing.stage import Stage
    from saehub_dictionary_learning.extract import NNsightExtractor

    found = {}
    for family in ("llama", "gpt2", "gpt_neox"):
        stage = Stage(folder / family, family)
        model, tokens = stage.model, stage.tokens()
        sites = []
        for site in [f"{kind}.{layer}" for kind in KINDS[:-1] for layer in (0, 1)] + ["embed"]:
            try:
                Site.parse(site).tap(model.shape)
                sites.append(site)
            except UsageError:
                pass
        before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
        rows = NNsightExtractor().open(model, tokens, sites, lm_batch=4).rows(1)
        ours = taps.read(model.hf, tokens.tokens(4, 8), {site: Site.parse(site).tap(model.shape) for site in sites})
        after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
        gaps = {site: float((rows.acts[site] - x.flatten(0, 1)).norm() / x.norm()) for site, x in ours.items()}
        found[family] = {"gaps": gaps, "hooks": after - before}
    return found


def defects() -> dict:
    """What the adapter warns of or refuses, seen in the library itself."""
    seen = {}
    short = {**SIZES, "warmup_steps": 2}
    draw = torch.Generator().manual_seed(0)
    x_BD = torch.randn(64, 32, generator=draw)
    standard = trainer_class("standard")(**short, sparsity_warmup_steps=2, seed=0)
    seen["encoder bias at the start"] = float(standard.ae.encoder.bias.abs().max())
    made = [trainer_class("jump_relu")(**short, sparsity_warmup_steps=2, seed=0).ae.W_dec.detach() for _ in range(2)]
    seen["jump_relu ignores its seed"] = not torch.equal(*made)

    anneal = {**short, "sparsity_warmup_steps": 2, "anneal_start": 10, "seed": 0}
    try:
        trainer = trainer_class("p_anneal")(**anneal)
        for step in range(40):
            trainer.update(step, x_BD)
        seen["Lp with p_end 0"] = "trains"
    except ZeroDivisionError as error:
        seen["Lp with p_end 0"] = f"ZeroDivisionError at step {step}: {error}"
    trainer = trainer_class("p_anneal")(**anneal, sparsity_function="Lp^p")
    before = copy.deepcopy(trainer.ae.state_dict())
    dead_F = torch.arange(64) < 8
    trainer.update(0, x_BD)
    before = copy.deepcopy(trainer.ae.state_dict())
    trainer.resample_neurons(dead_F.clone(), x_BD)
    seen["p_anneal's resampling changes"] = [name for name, value in trainer.ae.state_dict().items() if not torch.equal(value, before[name])]
    trainer = trainer_class("gated_anneal")(**anneal)
    try:
        trainer.resample_neurons(dead_F.clone(), x_BD)
        seen["gated_anneal's resampling"] = "works"
    except (TypeError, AttributeError, KeyError) as error:
        seen["gated_anneal's resampling"] = type(error).__name__

    batch = trainer_class("batch_topk")(**short, k=4, threshold_start_step=1000, seed=0)
    for step in range(5):
        batch.update(step, x_BD)
    relu_BF = torch.relu(batch.ae.encoder(x_BD - batch.ae.b_dec))
    seen["batch_topk before its threshold is a ReLU"] = torch.equal(batch.ae.encode(x_BD), relu_BF)

    topk = trainer_class("topk")(**short, k=4, seed=0)
    topk.ae.encoder.bias.data[:8] = -100.0
    topk.num_tokens_since_fired[:8] = topk.dead_feature_threshold
    _, _, _, rectified_BF = topk.ae.encode(x_BD, return_topk=True)
    topk.get_auxiliary_loss((x_BD - topk.ae(x_BD)).detach(), rectified_BF).backward()
    seen["AuxK's gradient of latents that are negative everywhere"] = float(topk.ae.encoder.weight.grad[:8].abs().max())

    nested = trainer_class("matryoshka_batch_topk")(**short, k=4, group_fractions=[0.5, 0.5], seed=0)
    f_BF, _, _ = nested.ae.encode(x_BD, return_active=True, use_threshold=False)
    prefixes = [((x_BD - f_BF[:, :n] @ nested.ae.W_dec[:n] - nested.ae.b_dec) ** 2).sum(1).mean() for n in (32, 64)]
    seen["matryoshka's loss over the sum of its prefixes'"] = float(nested.loss(x_BD, step=0) / sum(prefixes))

    jump = trainer_class("jump_relu")(**short, sparsity_warmup_steps=2, seed=0, bandwidth=0.5)
    from dictionary_learning.trainers.jumprelu import JumpReLUFunction, StepFunction

    theta = torch.tensor([1.0], requires_grad=True)
    moved = []
    for p in (0.8, 1.2):  # both within half a bandwidth of θ
        theta.grad = None
        StepFunction.apply(JumpReLUFunction.apply(torch.tensor([[p]]), theta.detach(), jump.bandwidth), theta, jump.bandwidth).sum().backward()
        moved.append(float(theta.grad))
    seen["jump_relu's L0 gradient below and above its threshold"] = moved
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    spec = json.loads((target / "spec.json").read_text())
    dictionaries = train(target, spec["jobs"])
    facts = {"evaluate": evaluate(target, spec["evaluate"], dictionaries), "extract": extract(target), "defects": defects()}
    (target / "facts.json").write_text(json.dumps(facts))
