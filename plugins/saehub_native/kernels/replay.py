"""A training step and its rows in; the same step out, recorded once as a CUDA graph and played back where that is possible.

The step reads rows, targets and three numbers (the step's learning rate in Adam's two scales, and t) from tensors at fixed addresses, and changes
parameters, moments and counters where they lie. Recording runs the very function that otherwise runs op by op, so the two cannot drift apart. Steps that
must wait for the device (an audit, the first ones, which compile) run op by op; after a raised r, which changes shapes, the step is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saehub_native.kernels.gpu import GpuKernels
    from saehub_native.optim import Adam

WARM = 3  # steps op by op before a recording: kernels are compiled and loaded, buffers made

Work = Callable[[Tensor, Tensor, Tensor], Any]
"""Rows, targets, and float32 [3]: the size of Adam's step, its second moment's correction, t."""


def why_not(config: Any, architecture: Any, kernels: Any) -> str | None:
    """Why a training cannot run as steps that never wait for the device; None if it can."""
    if kernels.name != "gpu":
        return f"the kernels are {kernels.name}"
    if getattr(architecture, "rule", None) not in ("top", "abs") or not getattr(architecture, "static", False):
        return f"how many pairs a row has, or which kernels run, differs from batch to batch with {config.architecture()}"
    if config.optimizer != "adam":
        return f"{config.optimizer} is its library's own"
    if config.k_anneal:
        return "k_anneal changes k from step to step"
    return None


class Replay:
    """`work(x, y, numbers)`, called with rows of one shape; what it returned stays valid until the next call."""

    def __init__(self, work: Work, optimizer: Adam, kernels: GpuKernels, ranked: Tensor):
        self.work, self.optimizer, self.kernels, self.ranked = work, optimizer, kernels, ranked
        self.x_BD: Tensor | None = None
        self.y_BD: Tensor | None = None
        self.numbers_3: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outcome: Any = None
        self.warm, self.r, self.replayed = 0, kernels.r, 0
        self.reason: str | None = None if torch.cuda.is_available() else "there is no CUDA device"
        """Why nothing is recorded."""

    def __call__(self, x_BD: Tensor, y_BD: Tensor, lr: float) -> Any:
        """One step."""
        same = y_BD is x_BD
        if self.x_BD is None or self.x_BD.shape != x_BD.shape or (self.y_BD is self.x_BD) != same:
            self.forget()
            self.x_BD = torch.empty_like(x_BD, memory_format=torch.contiguous_format)
            self.y_BD = self.x_BD if same else torch.empty_like(y_BD, memory_format=torch.contiguous_format)
            self.numbers_3 = torch.empty(3, device=x_BD.device)
        self.x_BD.copy_(x_BD)
        if not same:
            self.y_BD.copy_(y_BD)
        self.numbers_3.copy_(torch.tensor(self.optimizer.scales(lr), dtype=torch.float32))
        if self.kernels.r != self.r:
            self.forget()
        if self.reason is not None or self.warm < WARM or self.kernels.audit_due():
            self.warm += 1
            return self.work(self.x_BD, self.y_BD, self.numbers_3)
        self.kernels.low(self.ranked)  # the copy, where something other than the step changed the weight
        if self.graph is None:
            self._record()
            if self.graph is None:
                return self.work(self.x_BD, self.y_BD, self.numbers_3)
        self.graph.replay()
        self.replayed += 1
        self.kernels.selections += 1
        return self.outcome

    def forget(self) -> None:
        """Drop the recording: shapes have changed."""
        self.graph, self.outcome, self.warm, self.r = None, None, 0, self.kernels.r

    def _record(self) -> None:
        """Record the work; nothing is computed by this."""
        selections, graph = self.kernels.selections, torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be extracting
                self.outcome = self.work(self.x_BD, self.y_BD, self.numbers_3)
            self.graph = graph
        except Exception as error:  # whatever a driver, Triton or torch refuses: the step still runs op by op
            self.graph, self.outcome = None, None
            self.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            torch.cuda.synchronize()
        finally:
            self.kernels.selections = selections
