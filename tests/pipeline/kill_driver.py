"""Runs a recipe in this process and kills it (SIGKILL) at the moment named on the command line; states are kept for the test to compare.

A job whose id ends in `-int8`, `-bfloat16`, `-float32` or `-reference` begins with those kernels. One that goes on is offered others: what its
state was trained with has to overrule that.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

RECIPE, MOMENT, AT, KEEP = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
KERNELS = {"int8": "cpu:int8", "bfloat16": "cpu:bfloat16", "float32": "cpu:float32", "reference": "reference"}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls: int, function, early: bool = False):
    """`function`, but the process dies at its `calls`-th call (before or after doing its work)."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if early and count == calls:
            die()
        result = function(*args, **kwargs)
        if count == calls:
            die()
        return result

    return wrapped


def with_kernels(begin):
    """`Progress.__init__`, with the kernels that the job's id names."""

    def begun(self, context, stage):
        begin(self, context, stage)
        word, others = self.job.id.rpartition("-")[2], list(KERNELS.values())
        if word in KERNELS:
            os.environ["SAEHUB_KERNELS"] = others[others.index(KERNELS[word]) - any(self.folder.glob("step-*"))]

    return begun


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import safetensors.torch
    from saehub_native import extract, train as native

    from saehub.pipeline import progress, resume, train

    drop = train.drop_states

    def keep_then_drop(folder: Path) -> None:
        shutil.copytree(folder, KEEP / folder.name, dirs_exist_ok=True)
        drop(folder)

    train.drop_states = keep_then_drop
    progress.Progress.__init__ = with_kernels(progress.Progress.__init__)
    if MOMENT == "inside a block":
        native.NativeSession.step = after(AT, native.NativeSession.step)
    elif MOMENT == "inside a step":  # gradients are there, some weights are not updated yet
        native.clip = after(AT, native.clip)
    elif MOMENT == "while extracting":
        session = extract.HFSession
        session.rows = after(AT, session.rows, early=True)
    elif MOMENT == "while state is being written":
        save_file, count = safetensors.torch.save_file, 0

        def half(tensors, path, *args):
            nonlocal count
            save_file(tensors, path, *args)
            if Path(path).name == "state.safetensors":
                count += 1
                if count == AT:
                    Path(path).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])
                    die()

        safetensors.torch.save_file = half
    elif MOMENT == "between state and rename":
        resume.write_json_atomic = after(AT, resume.write_json_atomic)
    elif MOMENT == "while publishing":
        train.finish = after(AT, train.finish)
    from saehub.cli.main import run

    sys.exit(run(["recipe", "run", RECIPE]))


if __name__ == "__main__":
    main()
