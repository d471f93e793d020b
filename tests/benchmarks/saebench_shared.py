"""How much eight SAEs gain from sharing the forward passes that no SAE enters, in `saebench/core`: CPU seconds, bit-identical numbers.

    python tests/benchmarks/saebench_shared.py [--saes 8] [--batches 1 10] [--repeats 3] [--layers 6 --width 512]

Shared and unshared runs take turns in one process. CPU time of the process (one thread) is measured, not wall time, so that other work on the
machine does not count. The embedded tiny Llama, six layers of width 160 with 4,096 words, reading after block 2; SAEs of 640 latents, k = 32.
The gain is the larger, the more of the work is the model's: `--layers` and `--width` take a Llama of that size with random weights instead, and SAEs of
four times its width, reading after half of its layers. `--batches` are those of cross-entropy and of reconstruction, each of 16 sequences of 128 tokens: 200 and 2000 in the paper, here in the same proportion.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from saehub.api import ModelSpec
from saehub.checkpoint.format import save
from saehub.data.model import ModelHandle
from saehub.data.tokens import TokenPolicy, build
from saehub.pipeline.evaluation import open_context
from saehub.recipe.schema import SourceEntry
from saehub.testing.saes import fit_to


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs=2, default=(1, 10))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="0: the embedded model")
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = ModelSpec(random_llama(folder / "model", options.layers, options.width) if options.layers else "builtin/tiny-llama", device="cpu")
        model = ModelHandle.load(spec)
        layer = model.shape.n_layers // 2 - 1
        site = f"resid_post.{layer}"
        policy = TokenPolicy(context=128, bos="sequence", exclude=("bos", "pad"), template=None)
        source = SourceEntry(source="builtin/python-docs", split="heldout")
        tokens = build([(source, 1.0)], spec, policy, folder / "tokens", rows=(max(options.batches) + 1) * 16 * 127, calibration=0, seed=0)
        with torch.no_grad():
            x_ND = model.hf(tokens.tokens(0, 8), output_hidden_states=True).hidden_states[layer + 1].flatten(0, 1)
        paths = {f"sae-{seed}": save(fit_to(x_ND, d_sae=4 * model.shape.d_model, k=32, seed=seed), folder / f"sae-{seed}", site=site) for seed in range(options.saes)}
        context = open_context(
            {
                "subjects": [{"id": name, "path": str(path), "site": site, "target_site": None} for name, path in paths.items()],
                "model": asdict(spec), "datasets": {"in_sample": str(tokens.path)}, "extractor": {"address": "native/hf", "config": {}},
                "seed": 0, "device": "cpu", "work_dir": str(folder / "work"), "lm_batch": 16,
            },
            model=model,
        )  # fmt: skip
        config = CoreConfig(*options.batches, seeds=(42,))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        values = {}
        alone = replace(context, subjects=context.subjects[:1])
        Core(config).evaluate(alone)  # imports and first touches are nobody's
        started = time.process_time()
        Core(config).evaluate(alone)
        one = time.process_time() - started
        for _ in range(options.repeats):
            for share in (False, True):
                started = time.process_time()
                rows = Core(config, share=share).evaluate(context)
                seconds[share].append(time.process_time() - started)
                print(f"shared {share}: {seconds[share][-1]:.1f} s", file=sys.stderr)
                values[share] = [(row.metric, row.subjects, row.value) for row in rows]
    ratios = sorted(alone / shared for alone, shared in zip(seconds[False], seconds[True], strict=True))
    print(
        json.dumps(
            {
                "command": f"python tests/benchmarks/saebench_shared.py --saes {options.saes} --batches {options.batches[0]} {options.batches[1]} --repeats {options.repeats}"
                + (f" --layers {options.layers} --width {options.width}" if options.layers else ""),
                "cpu_seconds_one_sae": round(one, 2),
                "cpu_seconds_unshared": [round(value, 2) for value in seconds[False]],
                "cpu_seconds_shared": [round(value, 2) for value in seconds[True]],
                "cpu_seconds_each_sae_adds": round((min(seconds[True]) - one) / (options.saes - 1), 2) if options.saes > 1 else None,
                "gain_median": round(ratios[len(ratios) // 2], 2),
                "bit_identical": values[True] == values[False],
            },
            indent=1,
        )
    )


def random_llama(folder: Path, layers: int, width: int) -> str:
    """Write a Llama with random weights and the embedded tokenizer: a forward pass costs the same whatever the weights are."""
    import shutil

    import transformers

    from saehub.builtin import model_dir

    shutil.copytree(model_dir("builtin/tiny-llama"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, width, 4 * width
    config.num_attention_heads = config.num_key_value_heads = width // 64
    config.head_dim = 64
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
