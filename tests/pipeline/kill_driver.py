"""Runs a recipe in this process and kills it (SIGKILL) at the moment named on the command line; states are kept for the test to compare."""

import os
import shutil
import signal
import sys
from pathlib import Path

RECIPE, MOMENT, AT, KEEP = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])


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


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import safetensors.torch
    from saehub_native import extract, train as native

    from saehub.pipeline import resume, train

    drop = train.drop_states

    def keep_then_drop(folder: Path) -> None:
        shutil.copytree(folder, KEEP / folder.name, dirs_exist_ok=True)
        drop(folder)

    train.drop_states = keep_then_drop
    if MOMENT == "inside a block":
        native.NativeSession.step = after(AT, native.NativeSession.step)
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
    import saehub

    saehub.run(RECIPE)


if __name__ == "__main__":
    main()
