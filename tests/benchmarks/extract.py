"""Tokens a second of native/hf beside the peers' own ways to get activations: `python tests/benchmarks/extract.py [--rounds 5] [--json]`.

A random Llama (width 256, 6 layers, vocabulary 4096), 4 x 32 x 128 tokens a turn, the site after layer 3. native/hf reads through its own session
(`rows`: hooks, early stop, keep mask), in float32 and in bfloat16; SAELens through its `HookedProxyLM`, stopped at the layer; Sparsify with its
`Trainer.fit` and an 8-latent SAE, which runs the whole model and the head; dictionary_learning with its nnsight `ActivationBuffer`, which also
tokenises, in a process of its own, because importing nnsight changes torch. Everything else shares one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as saehub's command line sets it

import interleaved
import torch
import transformers

LAYER, SEQUENCES, CONTEXT, VOCABULARY, TURN = 3, 32, 128, 4096, 4


def model(dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1024, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def ids(batches: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batches * SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(1))


def native_session(dtype: torch.dtype, batches: int):
    """An open native/hf session over `batches` batches of random tokens."""
    from saehub_native.extract import HFSession

    from saehub.data.model import shape_of

    hf, tokens_NT = model(dtype), ids(batches)
    tokens = SimpleNamespace(
        context=CONTEXT,
        hash="benchmark",
        n_batches=lambda lm_batch: batches,
        calibration_batches=lambda lm_batch: 0,
        tokens=lambda i, j: tokens_NT[i:j],
        keep=lambda i, j: torch.ones(j - i, CONTEXT, dtype=torch.bool),
        batch_range=lambda batch, lm_batch: (batch * lm_batch, (batch + 1) * lm_batch),
        kept=lambda i, j: (j - i) * CONTEXT,
    )
    return HFSession(SimpleNamespace(hf=hf, shape=shape_of(hf.config.to_dict())), tokens, [f"resid_post.{LAYER}"], SEQUENCES)


def native(dtype: torch.dtype):
    """The rows of TURN batches."""
    session = native_session(dtype, TURN)
    return lambda _turn: [session.rows(batch) for batch in range(TURN)]


def whole_model():
    """What one would write: the whole model under no_grad."""
    hf, tokens_NT = model(), ids(TURN)

    def go(_turn: int) -> None:
        with torch.no_grad():
            for batch in tokens_NT.split(SEQUENCES):
                hf(batch)

    return go


def saelens():
    """SAELens' wrapper for plain Hugging Face models."""
    from sae_lens.load_model import HookedProxyLM

    name, tokens_NT = f"model.layers.{LAYER}", ids(TURN)
    proxy = HookedProxyLM(model(), tokenizer=None, hook_names=[name])

    def go(_turn: int) -> None:
        with torch.no_grad():
            for batch in tokens_NT.split(SEQUENCES):
                proxy.run_with_cache(batch, names_filter=[name], stop_at_layer=LAYER + 1)

    return go


def sparsify():
    """Sparsify's own training loop with the smallest SAE there is."""
    from sparsify import SaeConfig, Trainer, TrainConfig

    data = [{"input_ids": row} for row in ids(TURN)]  # what a tokenised dataset gives
    folder = tempfile.mkdtemp()
    settings = dict(batch_size=SEQUENCES, layers=[LAYER], save_every=10**9, log_to_wandb=False, save_dir=folder, run_name="benchmark")
    trainer = Trainer(TrainConfig(SaeConfig(num_latents=8, k=4), **settings), data, model())

    def go(_turn: int) -> None:
        trainer.global_step = 0
        trainer.fit()

    return go


def dictionary_learning_worker() -> None:
    """A process that refreshes an ActivationBuffer for each line that it reads."""
    from dictionary_learning.buffer import ActivationBuffer
    from nnsight import LanguageModel
    from transformers import AutoTokenizer

    from saehub.builtin import model_dir

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir("tiny-llama")))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lm = LanguageModel(model(), tokenizer=tokenizer)
    wide_NT = torch.randint(0, min(len(tokenizer), VOCABULARY), (TURN * SEQUENCES, 2 * CONTEXT), generator=torch.Generator().manual_seed(1))
    texts = tokenizer.batch_decode(wide_NT)  # more than CONTEXT tokens each: every sequence is cut to CONTEXT
    turn = [0]

    class Buffer(ActivationBuffer):
        def text_batch(self, batch_size: int | None = None):
            turn[0] += 1
            first = turn[0] % TURN * SEQUENCES
            return texts[first : first + SEQUENCES]

    buffer = Buffer(
        iter(()), lm, lm.model.layers[LAYER], d_submodule=256, n_ctxs=TURN * SEQUENCES, ctx_len=CONTEXT, refresh_batch_size=SEQUENCES, out_batch_size=1024
    )
    for _line in sys.stdin:
        buffer.read[:] = True
        buffer.refresh()
        print("done", flush=True)


def dictionary_learning():
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def go(_turn: int) -> None:
        worker.stdin.write("go\n")
        worker.stdin.flush()
        while (line := worker.stdout.readline()) and line != "done\n":
            pass
        if not line:
            raise RuntimeError("the dictionary_learning process ended")

    return go


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        dictionary_learning_worker()
        return
    ways = {
        "native/hf, float32": native(torch.float32),
        "native/hf, bfloat16": native(torch.bfloat16),
        "whole model with logits": whole_model(),
        "SAELens HookedProxyLM": saelens(),
        "dictionary_learning buffer": dictionary_learning(),
        "Sparsify Trainer.fit": sparsify(),
    }
    seconds = interleaved.interleave(ways, options.rounds)
    record = {**interleaved.machine(), "tokens": TURN * SEQUENCES * CONTEXT, "seconds": seconds}
    if options.json:
        print(json.dumps(record))
        return
    print(interleaved.headline(record))
    print("a random Llama, width 256, 6 layers, site after layer 3: median [p10 p90]; time over that of native in the same round")
    plain, low = (interleaved.ratios(seconds, f"native/hf, {kind}") for kind in ("float32", "bfloat16"))
    for name, values in seconds.items():
        s = interleaved.spread([record["tokens"] / v for v in values])
        print(f"{name:28s} {s['median']:9,.0f} [{s['p10']:,.0f} {s['p90']:,.0f}] tokens/s   {plain[name]:5.2f} x float32   {low[name]:5.2f} x bfloat16")


if __name__ == "__main__":
    main()
