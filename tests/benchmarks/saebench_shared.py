"""How much eight SAEs gain from sharing the forward passes that no SAE enters, in `saebench/core`: CPU seconds, bit-identical numbers.

    python tests/benchmarks/saebench_shared.py [--saes 8] [--tokens 16384] [--repeats 3]

Shared and unshared runs take turns in one process. CPU time of the process is measured, not wall time, so that other work on the machine does
not count. The embedded tiny Llama, six layers of width 160 with 4,096 words, reading after block 2; SAEs of 640 latents, k = 32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from saehub.api import ModelSpec
from saehub.checkpoint.format import save
from saehub.data.model import ModelHandle
from saehub.data.tokens import TokenPolicy, build
from saehub.pipeline.evaluation import open_context
from saehub.recipe.schema import SourceEntry
from saehub.testing.saes import fit_to

SITE = "resid_post.2"


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    for name, default in (("saes", 8), ("tokens", 16_384), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from saehub_saebench.config import CoreConfig
    from saehub_saebench.core import Core

    spec = ModelSpec("builtin/tiny-llama", device="cpu")
    model = ModelHandle.load(spec)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        policy = TokenPolicy(context=128, bos="sequence", exclude=("bos", "pad"), template=None)
        source = SourceEntry(source="builtin/python-docs", split="heldout")
        tokens = build([(source, 1.0)], spec, policy, folder / "tokens", rows=options.tokens, calibration=0, seed=0)
        with torch.no_grad():
            x_ND = model.hf(tokens.tokens(0, 8), output_hidden_states=True).hidden_states[3].flatten(0, 1)
        paths = {f"sae-{seed}": save(fit_to(x_ND, d_sae=640, k=32, seed=seed), folder / f"sae-{seed}", site=SITE) for seed in range(options.saes)}
        context = open_context(
            {
                "subjects": [{"id": name, "path": str(path), "site": SITE, "target_site": None} for name, path in paths.items()],
                "model": asdict(spec), "datasets": {"in_sample": str(tokens.path)}, "extractor": {"address": "native/hf", "config": {}},
                "seed": 0, "device": "cpu", "work_dir": str(folder / "work"), "lm_batch": 16,
            },
            model=model,
        )  # fmt: skip
        config = CoreConfig(seeds=(42,))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        values = {}
        Core(config).evaluate(context)  # imports and first touches are nobody's
        for _ in range(options.repeats):
            for share in (False, True):
                started = time.process_time()
                rows = Core(config, share=share).evaluate(context)
                seconds[share].append(time.process_time() - started)
                values[share] = [(row.metric, row.subjects, row.value) for row in rows]
    ratios = sorted(alone / shared for alone, shared in zip(seconds[False], seconds[True], strict=True))
    print(
        json.dumps(
            {
                "command": f"python tests/benchmarks/saebench_shared.py --saes {options.saes} --tokens {options.tokens} --repeats {options.repeats}",
                "cpu_seconds_unshared": [round(value, 2) for value in seconds[False]],
                "cpu_seconds_shared": [round(value, 2) for value in seconds[True]],
                "gain_median": round(ratios[len(ratios) // 2], 2),
                "bit_identical": values[True] == values[False],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
