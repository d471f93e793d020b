"""The standard library's text comes in; `tiny_llama/`, a small Llama with its tokenizer, training log and held-out figures, goes out.

    python -m saehub.builtin.train_tiny_llama --minutes 55 --threads 2     # train; the same command continues after a kill
    python -m saehub.builtin.train_tiny_llama --evaluate                   # held-out nats/token of the shipped weights

The schedule runs on the clock: progress = seconds trained / seconds allowed, so that a shared machine gets a shorter run
and not a half-decayed one. Training text is the train split of both sources plus the train split of the test and optional
packages where the interpreter has them, without the tests of held-out modules.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from . import SOURCES, model_dir, text

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = range(3)
CONTEXT = 128  # of the held-out figures: BOS and 127 tokens, every token but BOS is a target


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights."""

    vocab: int = 4096
    """Tokens, the three special ones included."""
    d_model: int = 160
    """Width of the residual stream."""
    layers: int = 6
    """Transformer blocks."""
    heads: int = 5
    """Attention heads, 32 wide each."""
    d_mlp: int = 432
    """Width of the gated MLP."""
    positions: int = 256
    """Training context and the largest context the model accepts."""
    batch: int = 32
    """Windows a step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW (betas 0.9, 0.95)."""
    weight_decay: float = 0.1
    """On matrices, not on norm gains."""
    warmup: float = 0.02
    """Share of the time in which the learning rate rises from 0."""
    decay: float = 0.5
    """Share of the time, at the end, in which it falls linearly to 0."""
    mix: tuple[float, ...] = (0.20, 0.08, 0.36, 0.36)
    """Share of windows from docs, docs of the extra packages, code, code of the extra packages."""
    seed: int = 0
    """Of the initial weights and of the order of the windows."""


# ---------------------------------------------------------------- text and tokens

def extra_modules() -> list[str]:
    """Train split of the test and optional packages, for training only; what is named after a held-out module is left out."""
    stems = set()
    for path in text.modules():
        if text.split_of(path) == "heldout":
            parts = path.removesuffix("/__init__.py").removesuffix(".py").split("/")
            stems |= {parts[-1], "".join(parts)}

    def about_heldout(path: str) -> bool:
        names = [part.removesuffix(".py").lstrip("_").removeprefix("test").lstrip("_") for part in path.split("/")]
        return any(name == stem or (len(stem) > 3 and name.startswith(stem)) for name in names for stem in stems)

    return [p for p in text.modules(extra=True) if text.split_of(p) == "train" and not about_heldout(p)]


def train_tokenizer(recipe: Recipe, corpus: Iterable[str], out: Path) -> None:
    """Write a byte-level BPE tokenizer that adds no special token by itself: packing is the caller's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=recipe.vocab, special_tokens=list(SPECIAL), show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bos, eos, pad = SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=recipe.positions,
                            clean_up_tokenization_spaces=False).save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 and 5 both know
    _write(out / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def tokens_of(tokenizer, documents: Iterable[text.Document]) -> tuple[torch.Tensor, str]:
    """All documents' token ids in a row (int64 [n]), EOS after each, and the SHA-256 of ids and texts."""
    digest, texts = hashlib.sha256(), []
    for document in documents:
        digest.update(f"{document.id}\0{document.text}\0".encode())
        texts.append(document.text)
    ids: list[int] = []
    for start in range(0, len(texts), 64):
        for row in tokenizer(texts[start:start + 64], add_special_tokens=False, verbose=False)["input_ids"]:
            ids += row
            ids.append(EOS)
    return torch.tensor(ids), digest.hexdigest()


def windows(stream_N: torch.Tensor, context: int) -> torch.Tensor:
    """Cut a row of tokens into [n, context] windows, BOS first in each; the incomplete last one is dropped."""
    n = len(stream_N) // (context - 1)
    body = stream_N[: n * (context - 1)].view(n, context - 1)
    return torch.cat([torch.full((n, 1), BOS), body], dim=1)


# ---------------------------------------------------------------- the model on disk

def new_model(recipe: Recipe):
    """A LlamaForCausalLM of the recipe's sizes, initialised from its seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=recipe.vocab, hidden_size=recipe.d_model, intermediate_size=recipe.d_mlp, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, max_position_embeddings=recipe.positions,
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD))


def save_model(model, out: Path) -> None:
    """Store the weights as bfloat16 (half the size) under a config that says float32, which is what they are loaded as."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config.pop("torch_dtype", None)
    config.update(architectures=["LlamaForCausalLM"], dtype="float32")
    _write(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").chmod(0o644)
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


@torch.no_grad()
def heldout(model, tokenizer, source: str, context: int = CONTEXT) -> dict:
    """Mean next-token loss on the held-out split, nats/token, with its standard error over windows of `context` tokens."""
    stream, digest = tokens_of(tokenizer, text.documents(source, "heldout"))
    rows = windows(stream, context)
    losses = []
    for batch in rows.split(32):
        logits = model(input_ids=batch).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1))
    loss = torch.cat(losses).double()
    return {"source": source, "split": "heldout", "context": context, "nats_per_token": loss.mean().item(),
            "stderr": (loss.std() / math.sqrt(len(loss))).item(), "sequences": len(loss), "data_sha256": digest}


def evaluate(folder: Path) -> list[dict]:
    """Held-out figures of a model folder: its stored weights, loaded and run in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [heldout(model, tokenizer, source) for source in SOURCES]


# ---------------------------------------------------------------- training

def learning_rate(recipe: Recipe, progress: float) -> float:
    """Warm-up, plateau, linear decay to 0; `progress` in [0, 1]."""
    return recipe.lr * min(1.0, progress / recipe.warmup, (1.0 - progress) / recipe.decay)


class Trainer:
    """Model, optimizer and sampler, whose whole state is one safetensors file and one JSON file."""

    def __init__(self, recipe: Recipe, streams: list[torch.Tensor], compiled: bool):
        self.recipe, self.streams = recipe, streams
        self.model = new_model(recipe)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}],
                                           lr=recipe.lr, betas=(0.9, 0.95))
        self.sampler = torch.Generator().manual_seed(recipe.seed)
        self.step, self.seconds = 0, 0.0
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, rows_BT: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=rows_BT[:, :-1], use_cache=False).last_hidden_state
        logits = F.linear(hidden.flatten(0, 1), self.model.model.embed_tokens.weight)
        return F.cross_entropy(logits.float(), rows_BT[:, 1:].flatten())

    def batch(self) -> torch.Tensor:
        """[batch, positions + 1] windows: BOS, then tokens from a random place of a stream drawn by `mix`."""
        r = self.recipe
        which = torch.multinomial(torch.tensor(r.mix), r.batch, replacement=True, generator=self.sampler)
        rows = torch.full((r.batch, r.positions + 1), BOS)
        for row, stream in enumerate(which.tolist()):
            start = torch.randint(len(self.streams[stream]) - r.positions, (1,), generator=self.sampler).item()
            rows[row, 1:] = self.streams[stream][start:start + r.positions]
        return rows

    def update(self, progress: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.loss(self.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def save(self, folder: Path) -> None:
        tensors = {"sampler": self.sampler.get_state()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "state.tmp", metadata={"progress": json.dumps({"step": self.step, "seconds": self.seconds})})
        os.replace(folder / "state.tmp", folder / "state.safetensors")

    def restore(self, folder: Path) -> bool:
        file = folder / "state.safetensors"
        if not file.is_file():
            return False
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            progress = json.loads(opened.metadata()["progress"])
        tensors = load_file(file)
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.sampler.set_state(tensors["sampler"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
                self.optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        return True


def train(recipe: Recipe, minutes: float, out: Path, state: Path, save_every: float, compiled: bool = True) -> None:
    """Train for `minutes` of this process's time in all, resumed runs included, and leave a usable model at every save."""
    from transformers import AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    log = state / "train_log.jsonl"
    if not (state / "tokenizer_ready").exists():
        train_tokenizer(recipe, (d.text for source in SOURCES for d in text.documents(source, "train")), out)
        (state / "tokenizer_ready").touch()
    tokenizer = AutoTokenizer.from_pretrained(out)
    streams, data = [], []
    for source in SOURCES:
        for kind, documents in (("train", text.documents(source, "train")), ("extra", text.read(source, extra_modules()))):
            stream, digest = tokens_of(tokenizer, documents)
            streams.append(stream)
            data.append({"source": source, "part": kind, "tokens": len(stream), "sha256": digest})

    trainer = Trainer(recipe, streams, compiled)
    resumed = trainer.restore(state)
    _log(log, {"event": "resume" if resumed else "start", "python": platform.python_version(), "torch": torch.__version__,
               "threads": torch.get_num_threads(), "minutes": minutes, "recipe": asdict(recipe), "data": data,
               "parameters": sum(p.numel() for p in trainer.model.parameters()), "step": trainer.step})
    budget, window = minutes * 60, recipe.batch * recipe.positions
    last, next_save, recent = time.monotonic(), trainer.seconds + min(180.0, save_every), []
    while trainer.seconds < budget:
        recent.append(trainer.update(trainer.seconds / budget))
        now = time.monotonic()
        trainer.seconds += now - last
        last = now
        if not math.isfinite(recent[-1]):
            sys.exit(f"the loss is {recent[-1]} at step {trainer.step}: lower --lr; the last good state is in {state}")
        if trainer.step % 100 == 0:
            _log(log, {"step": trainer.step, "tokens": trainer.step * window, "seconds": round(trainer.seconds, 1),
                       "loss": round(sum(recent) / len(recent), 4), "lr": round(learning_rate(recipe, min(1.0, trainer.seconds / budget)), 6)})
            recent = []
        if trainer.seconds >= min(next_save, budget):
            trainer.save(state)
            save_model(trainer.model, out)
            figures = {row["source"]: round(row["nats_per_token"], 4) for row in evaluate(out)}
            _log(log, {"event": "save", "step": trainer.step, "tokens": trainer.step * window, "seconds": round(trainer.seconds, 1),
                       "heldout": figures})
            _write(out / "train_log.jsonl", log.read_text())
            next_save = trainer.seconds + save_every
            last = time.monotonic()  # evaluation is not training time


def _log(log: Path, row: dict) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    with log.open("a") as stream:
        stream.write(line + "\n")


def main() -> None:
    """The command line: train, or `--evaluate` the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="print the held-out figures of the shipped weights and stop")
    parser.add_argument("--minutes", type=float, default=55.0, help="training time in all (default 55)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=model_dir("tiny-llama"), help="model folder (default: the embedded one)")
    parser.add_argument("--state", type=Path, default=Path(".saehub/train-tiny-llama"), help="what a killed run continues from")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between usable models")
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile, which needs a C++ compiler")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.evaluate:
        for row in evaluate(options.out):
            print(f"{row['source']:12} {row['split']}: {row['nats_per_token']:.4f} +- {row['stderr']:.4f} nats/token "
                  f"({row['sequences']} sequences of {row['context']}, data {row['data_sha256'][:12]})")
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(Recipe(lr=options.lr), options.minutes, options.out, options.state, options.save_every, compiled=not options.no_compile)


if __name__ == "__main__":
    main()
