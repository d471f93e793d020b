"""Tokens a second of our extraction beside plain ways to run the same model, rounds interleaved: `python tests/benchmarks/extraction.py`.

A random Llama (width 256, 6 layers, vocabulary 4096), 32 x 128 tokens, the site after layer 3. Ratios are of the same round, so they hold on
a busy machine; the median over rounds is printed.
"""

import statistics
import time

import torch
import transformers

from saehub.activations import taps
from saehub.sites import Tap

ROUNDS = 7


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1024, vocab_size=4096, max_position_embeddings=128
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids_BT = torch.randint(0, 4096, (32, 128))
    after = {"resid_post.3": Tap("model.layers.3", "out")}
    several = after | {
        "mlp_act.1": Tap("model.layers.1.mlp.down_proj", "in"),
        "attn_z.2": Tap("model.layers.2.self_attn.o_proj", "in"),
        "resid_post.0": Tap("model.layers.0", "out"),
    }

    def truncated():
        short = model.model.layers[4:]
        model.model.layers = model.model.layers[:4]
        try:
            with torch.inference_mode():
                model.model(ids_BT, use_cache=False)
        finally:
            model.model.layers.extend(short)

    def full():
        with torch.no_grad():
            model(ids_BT)

    def hidden_states():
        with torch.no_grad():
            model(ids_BT, output_hidden_states=True)

    ways = {
        "model cut after the layer": truncated,
        "taps.read, one site": lambda: taps.read(model, ids_BT, after),
        "taps.read, four sites": lambda: taps.read(model, ids_BT, several),
        "whole model with logits": full,
        "output_hidden_states": hidden_states,
    }
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    base = seconds["model cut after the layer"][1:]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in seconds.items():
        ratio = statistics.median(one / two for one, two in zip(values[1:], base, strict=True))
        print(f"{name:28s} {ids_BT.numel() / statistics.median(values[1:]):10,.0f} tokens/s   {ratio:5.2f} x the time of the first")


if __name__ == "__main__":
    main()
