"""A `Trainer.fit()` that pulls its batches in; one that is pushed, one step at a time, out. The library's code runs as it is, in a thread.

    hub                      gate                         fit(), in its thread
    step(x, y)  ── rows ──▶  advance()  ── go ──▶         model(ids) ─▶ hook ─▶ backward ─▶ optimizer.step()
                             waits      ◀── done ──       pbar.update()

The progress bar is ours: `update()` is the last thing that fit() does in a step (trainer.py:628 of 1.3.3), and there it waits. Between two steps
everything that training has is therefore at rest, and can be read, saved, or replaced. One batch is under way at a time: the spool's bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from saehub.errors import StageFailed

SITE = "site"
"""The hookpoint's name inside the replay model."""
_HERE = threading.local()


class _Stop(BaseException):
    """Unwinds fit() where it waits."""


class Gate:
    """Lets `fit` run from one update of its progress bar to the next. Holds a thread from the first step to `stop`."""

    def __init__(self, fit: Callable[[], None], device: str):
        self._fit, self._device = fit, torch.device(device)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopping = False

    @property
    def running(self) -> bool:
        """Whether fit() waits between two steps."""
        return self._thread is not None

    def advance(self) -> None:
        """One step; raises what fit() raised, then and ever after."""
        if self._error is None:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sparsify-fit", daemon=True)
                self._thread.start()
            else:
                self._go.release()
            self._done.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Unwind fit() and end the thread; `advance` starts it anew."""
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():
            return
        self._stopping = True
        self._go.release()
        if thread is not threading.current_thread():  # the garbage collector may call from anywhere
            thread.join()
        self._stopping = False

    def _run(self) -> None:
        _HERE.gate = self
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # the current device is a thread's own, and Triton launches there
            self._fit()
            self._error = StageFailed("sparsify's fit() ended before its last step", why="it no longer updates its progress bar after every step")
        except _Stop:
            return
        except BaseException as error:  # noqa: BLE001  it belongs to the caller of `advance`
            self._error = error
        self._done.release()

    def wait(self) -> None:
        """Called by the bar, in the thread: a step is done."""
        self._done.release()
        self._go.acquire()
        if self._stopping:
            raise _Stop


class Bar:
    """Stands in for tqdm in `sparsify.trainer`: prints nothing, and is where fit() waits."""

    def __init__(self, *_args: Any, **_settings: Any):
        self._gate: Gate | None = getattr(_HERE, "gate", None)

    def update(self, _steps: int = 1) -> None:
        """A step is done."""
        if self._gate is not None:
            self._gate.wait()

    def close(self) -> None:
        """Nothing is held."""


class _Tap(nn.Module):
    """The module whose input and output the library reads."""

    y: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.y is None else self.y


class ReplayModel(nn.Module):
    """What the library takes for a language model: its one module shows the rows of the batch that was laid down.

    Bit-identical to a model that computes these rows: the library clones what its hook sees, and trains on that.
    """

    def __init__(self, width: int, device: str):
        super().__init__()
        self.width = width
        self.device = torch.device(device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.add_module(SITE, _Tap())
        self.rows: tuple[Tensor, Tensor | None] | None = None

    @property
    def base_model(self) -> ReplayModel:
        """The library names hookpoints from here."""
        return self

    def forward(self, input_ids: Tensor, **_: Any) -> None:
        """The laid rows through the tap, [1, B, d]; they are used up by it."""
        tap = self.get_submodule(SITE)
        if self.rows is None and input_ids.numel() == 1:  # the library asks for the width
            tap.y = None
            tap(torch.zeros(1, 1, self.width, device=self.device))
            return
        if self.rows is None:
            raise StageFailed("sparsify asked for a second batch within a step", why="it no longer updates its progress bar after every step")
        (x_BD, y_BD), self.rows = self.rows, None
        tap.y = None if y_BD is None else y_BD.view(1, *y_BD.shape)
        tap(x_BD.view(1, *x_BD.shape))
        tap.y = None


class Batches(Dataset):
    """`steps` batches of row numbers: the library counts and masks them as it would token ids."""

    def __init__(self, steps: int, batch: int):
        self.steps, self.batch = steps, batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(self.batch)}

    def select(self, indices: range) -> Batches:
        """The rest of the run, as a resumed fit() asks for it."""
        return Batches(len(indices), self.batch)
