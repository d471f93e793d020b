"""A folder in; runs that Sparsify's own Trainer made on a language model, the rows that it saw there, and the SAEs that it saved, out.

Run in a process of its own (`python sparsify_trains.py FOLDER MODEL`). For every run: `<run>/<hookpoint>[/seedN]/` as the library saves it,
`<run>/rows.safetensors` with `x` and, for a transcoder, `y` of every step and hookpoint ([steps, batch, d]), `features.safetensors` with
what each saved SAE computes for x of the last step. The runs of END_TO_END take the model in the folder MODEL and the sequences in
FOLDER/tokens.safetensors. `facts.json`: gradients that the library does not give, and what a session of ours changes around itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D, LATENTS, K, STEPS, SEQUENCES, LENGTH = 16, 48, 6, 12, 4, 16
TOPK, GROUPMAX, MULTI = {}, {"activation": "groupmax"}, {"multi_topk": True}
TRANSCODER, SKIP = {"transcode": True}, {"transcode": True, "skip_connection": True}
ADAM = {"optimizer": "adam", "lr": 3e-3, "lr_warmup_steps": 2}
MUON = {"optimizer": "muon", "lr_warmup_steps": 2}
# run -> (the coder's settings, hookpoints, the run's settings)
RUNS = {
    "topk signum": (TOPK, ["layers.1"], {}),
    "topk adam": (TOPK, ["layers.1"], ADAM),
    "topk muon": (TOPK, ["layers.1"], MUON),
    "groupmax signum": (GROUPMAX, ["layers.1"], {}),
    "groupmax adam": (GROUPMAX, ["layers.1"], ADAM),
    "groupmax muon": (GROUPMAX, ["layers.1"], MUON),
    "multi_topk signum": (MULTI, ["layers.1"], {}),
    "multi_topk adam": (MULTI, ["layers.1"], ADAM),
    "multi_topk muon": (MULTI, ["layers.1"], MUON),
    "transcoder signum": (TRANSCODER, ["layers.1.mlp"], {}),
    "transcoder adam": (TRANSCODER, ["layers.1.mlp"], ADAM),
    "transcoder muon": (TRANSCODER, ["layers.1.mlp"], MUON),
    "skip_transcoder signum": (SKIP, ["layers.1.mlp"], {}),
    "skip_transcoder adam": (SKIP, ["layers.1.mlp"], ADAM),
    "skip_transcoder muon": (SKIP, ["layers.1.mlp"], MUON),
    "auxk": (TOPK, ["layers.1"], {**ADAM, "auxk_alpha": 1 / 32, "dead_feature_threshold": 100}),
    "k decay": (TOPK, ["layers.1"], {"k_decay_steps": 9}),
    "chunks": ({"normalize_decoder": False}, ["layers.1"], {**ADAM, "micro_acc_steps": 3}),
    "several": (TOPK, ["layers.0", "layers.1"], {**ADAM, "init_seeds": [3, 5]}),
}
# run -> (the coder's settings, hookpoint, the run's settings)
END_TO_END = {
    "kl": (TOPK, "layers.0", {**ADAM, "loss_fn": "kl"}),
    "ce": (GROUPMAX, "layers.0", {"loss_fn": "ce"}),
    "ce transcoder": (SKIP, "layers.1.mlp", {**ADAM, "loss_fn": "ce"}),
}


class Tokens(torch.utils.data.Dataset):
    """Sequences: random ones unless given."""

    def __init__(self, ids: torch.Tensor | None = None):
        random = torch.randint(0, 50, (STEPS * SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
        self.ids = random if ids is None else ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index]}


def main(folder: Path) -> None:
    """Every run of RUNS on a Llama with random weights."""
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(vocab_size=50, hidden_size=D, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    )
    for name, (coder, hookpoints, settings) in RUNS.items():
        sae = SparseCoderConfig(num_latents=LATENTS, k=K, **coder)
        cfg = TrainConfig(sae, batch_size=SEQUENCES, hookpoints=hookpoints, log_to_wandb=False, save_dir=str(folder), run_name=name, **settings)
        trainer = Trainer(cfg, Tokens(), model)
        seen: dict[str, list] = {f"{side} {point}": [] for point in hookpoints for side in ("in", "out")}

        def record(_module, inputs, output, point, seen=seen):
            seen[f"in {point}"].append(inputs[0].detach().flatten(0, 1).clone())
            seen[f"out {point}"].append((output[0] if isinstance(output, tuple) else output).detach().flatten(0, 1).clone())

        handles = [
            model.get_submodule(point).register_forward_hook(lambda module, i, o, point=point, record=record: record(module, i, o, point))
            for point in hookpoints
        ]
        trainer.fit()
        for handle in handles:
            handle.remove()
        rows = {}
        for point in hookpoints:
            rows[f"x {point}"] = torch.stack(seen[f"{'in' if cfg.sae.transcode else 'out'} {point}"])
            if cfg.sae.transcode:
                rows[f"y {point}"] = torch.stack(seen[f"out {point}"])
        save_file(rows, folder / name / "rows.safetensors")
        features = {}
        for file in (folder / name).rglob("cfg.json"):
            at = file.parent.relative_to(folder / name).as_posix()
            saved = SparseCoder.load_from_disk(file.parent)
            saved.cfg.k = K  # while k decays, cfg.json holds the transient one
            with torch.no_grad():
                values, indices, _ = saved.encode(rows[f"x {at.partition('/')[0]}"][-1])
            features[at] = torch.zeros(values.shape[0], LATENTS).scatter(1, indices, values)
        save_file(features, folder / name / "features.safetensors")


def end_to_end(folder: Path, model: Path) -> None:
    """Every run of END_TO_END on the sequences of FOLDER/tokens.safetensors, whose ids in `exclude` are left out."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModelForCausalLM

    given = load_file(folder / "tokens.safetensors")
    for name, (coder, point, settings) in END_TO_END.items():
        sae = SparseCoderConfig(num_latents=LATENTS, k=K, **coder)
        more = {**settings, "exclude_tokens": given["exclude"].tolist(), "save_dir": str(folder), "run_name": name}
        cfg = TrainConfig(sae, batch_size=SEQUENCES, hookpoints=[point], log_to_wandb=False, **more)
        hf = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
        Trainer(cfg, Tokens(given["ids"]), hf).fit()


def gradients() -> dict[str, float]:
    """Norms of encoder gradients: of AuxK and of multi-topk, which autograd would give; and of latents that were selected at zero."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    x_ND = torch.randn(64, D)
    coder = SparseCoder(D, SparseCoderConfig(num_latents=LATENTS, k=K, multi_topk=True))
    out = coder(x_ND, dead_mask=torch.arange(LATENTS) < LATENTS // 2)
    parameters = list(coder.encoder.parameters())
    found = {}
    for name, loss in (("auxk", out.auxk_loss), ("multi_topk", out.multi_topk_fvu)):
        found[name] = sum(float(g.norm()) for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if g is not None)
        found[f"{name} decoder"] = float(torch.autograd.grad(loss, coder.W_dec, retain_graph=True)[0].norm())
    coder = SparseCoder(D, SparseCoderConfig(num_latents=LATENTS, k=K))
    coder.encoder.bias.data.fill_(-100.0)  # no pre-activation is positive: nothing is active, nothing should learn
    found["inactive"] = float(torch.autograd.grad(coder(x_ND).fvu, coder.encoder.weight)[0].norm())
    return found


def isolation() -> dict[str, object]:
    """A session of ours in this process: what it changes around itself, and whether it imported or wrote anything."""
    from saehub_sparsify.config import TopKConfig
    from saehub_sparsify.training import SparsifyTrainer

    from saehub.api import Job
    from saehub.testing.conformance import world_unchanged

    torch.set_float32_matmul_precision("highest")  # the library's own runs left it at "high"
    files = set(os.listdir())
    x_ND = torch.randn(3, 64, D)
    kept = x_ND.clone()
    with world_unchanged():
        session = SparsifyTrainer(TopKConfig(k=K, width=LATENTS, batch=64, optimizer="muon")).open(Job("j", "s", None, D, D, 3, 64, 192, 0), None)
        for x_BD in x_ND:
            session.step(x_BD)
        session.load_state(*session.state())
        session.finish()
    return {
        "precision": torch.get_float32_matmul_precision(),
        "inputs": torch.equal(kept, x_ND),
        "wandb": "wandb" in sys.modules,
        "written": sorted(set(os.listdir()) - files),
    }


if __name__ == "__main__":
    os.environ |= {"SPARSIFY_DISABLE_TRITON": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    main(target)
    end_to_end(target, Path(sys.argv[2]))
    (target / "facts.json").write_text(json.dumps({"gradients": gradients(), "isolation": isolation()}))
