"""Twelve SAEs from one pass: its time over one extraction and twelve trainings measured alone: `python tests/benchmarks/end_to_end.py [--json]`.

A random Llama (width 256, 6 layers), the site after layer 3, 8 batches of 32 x 128 tokens; native/topk with 4096 latents, k 16 to 64, batch 2048.
The pass is the hub's: blocks of the stream, the next one extracted in the background while the trainers use the last; once more with extraction
and training in turn. Stages are interleaved in rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as saehub's command line sets it

import interleaved
import torch
from extract import LAYER, native_session

BATCHES, PER_BLOCK, BATCH, JOBS = 8, 2, 2048, 12
SITE = f"resid_post.{LAYER}"


def stream():
    """The block stream over a fresh session."""
    from saehub.activations.blocks import BlockStream

    session = native_session(torch.float32, BATCHES)
    rows = BATCHES * session.kept(0)
    return BlockStream(session, sites=[SITE], seed=0, batches_per_block=PER_BLOCK, dtype="float32", rows=rows, keep_hashes=False)


def sessions(count: int, rows: int):
    """Open trainings, alike but for k and seed."""
    from saehub.api import Job
    from saehub_native.config import TopKConfig
    from saehub_native.train import NativeTrainer

    made = []
    calibration_ND = torch.randn(1024, 256, generator=torch.Generator().manual_seed(3))
    for number in range(count):
        config = TopKConfig(k=(16, 32, 64)[number % 3], width=4096, batch=BATCH, calibration=1024)
        job = Job(f"job{number}", SITE, None, 256, 256, rows // BATCH, BATCH, rows, number)
        made.append(NativeTrainer(config).open(job, lambda n: (calibration_ND[:n], None)))
    return made


def train(session, block) -> None:
    for x_BD in block.acts[SITE].split(BATCH):
        session.step(x_BD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from saehub.activations.ahead import Ahead

    blocks = stream()
    kept = [blocks.block(b) for b in range(blocks.n_blocks)]
    seconds: dict[str, list[float]] = {"extraction alone": [], "twelve trainings alone": [], "one pass, in turn": [], "one pass, overlapped": []}

    def timed(name: str, run) -> None:
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)

    def extract() -> None:
        for b in range(blocks.n_blocks):
            blocks.block(b)

    def alone(jobs) -> None:
        for session in jobs:
            for block in kept:
                train(session, block)

    def together(jobs, take) -> None:
        for b in range(blocks.n_blocks):
            block = take(b)
            for session in jobs:
                train(session, block)

    def overlapped(jobs) -> None:
        ahead = Ahead(blocks.block, blocks.n_blocks)
        together(jobs, ahead.take)
        ahead.close()

    alone(sessions(1, blocks.rows))  # compiled
    for turn in range(options.rounds):
        stages = [
            lambda: timed("extraction alone", extract),
            lambda: (jobs := sessions(JOBS, blocks.rows)) and timed("twelve trainings alone", lambda: alone(jobs)),
            lambda: (jobs := sessions(JOBS, blocks.rows)) and timed("one pass, in turn", lambda: together(jobs, blocks.block)),
            lambda: (jobs := sessions(JOBS, blocks.rows)) and timed("one pass, overlapped", lambda: overlapped(jobs)),
        ]
        for stage in stages if turn % 2 == 0 else reversed(stages):
            stage()
    record = {**interleaved.machine(), "rows": blocks.rows, "seconds": seconds}
    sums = [a + b for a, b in zip(seconds["extraction alone"], seconds["twelve trainings alone"], strict=True)]
    record["ratio"] = {
        name: statistics.median(one / both for one, both in zip(seconds[name], sums, strict=True)) for name in seconds if name.startswith("one pass")
    }
    if options.json:
        print(json.dumps(record))
        return
    print(interleaved.headline(record))
    for name, values in seconds.items():
        s = interleaved.spread(values)
        print(f"{name:28s} {s['median']:7.2f} s [{s['p10']:.2f} {s['p90']:.2f}]")
    for name, ratio in record["ratio"].items():
        print(f"{name} / (extraction + trainings alone): {ratio:.2f}")


if __name__ == "__main__":
    main()
