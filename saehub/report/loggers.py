"""A run's event stream in; the same numbers in TensorBoard's or Weights & Biases' own files out, under the names of results.json.

Both libraries are optional and are imported when a run begins. Training metrics are `train/<SAE>/<metric>` at the number of tokens trained on;
measurements are `<SAE>/<dataset>/<metric>` (`weights` where a number needs no dataset), once, at the end of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from saehub.errors import MissingDependency, UsageError, did_you_mean
from saehub.pipeline.events import Event

EXTRA = "loggers"


class Sink(Protocol):
    """Where scalars go."""

    def put(self, scalars: dict[str, float], step: int) -> None:
        """Values by name, at a step that never falls for one name."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """`<run folder>/logs/tensorboard`; look at it with `tensorboard --logdir`."""

    library = "tensorboard"

    def __init__(self, run_dir: Path, recipe: str):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "logs" / "tensorboard"))

    def put(self, scalars: dict[str, float], step: int) -> None:
        """One point of each curve."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A run of project `saehub` (or `WANDB_PROJECT`); files under `<run folder>/logs`. `WANDB_MODE=offline` sends nothing anywhere."""

    library = "wandb"

    def __init__(self, run_dir: Path, recipe: str):
        import os

        import wandb

        folder = run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "saehub"), name=run_dir.name, dir=str(folder), config={"recipe": recipe, "run_dir": str(run_dir)},
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self._run.define_metric("tokens")
        self._run.define_metric("train/*", step_metric="tokens")

    def put(self, scalars: dict[str, float], step: int) -> None:
        """W&B's own step counts calls; `tokens` is the x axis."""
        self._run.log({**scalars, "tokens": step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Logger:
    """A listener of the event stream that feeds one sink; it opens with the run and closes with its end, also where that is a failure."""

    def __init__(self, name: str):
        """Raises UsageError for an unknown name, MissingDependency where its library is not installed."""
        from importlib.util import find_spec

        if name not in SINKS:
            raise UsageError(f"there is no logger {name!r}{did_you_mean(name, SINKS)}", fix=f"--log {' or --log '.join(SINKS)}")
        if find_spec(SINKS[name].library) is None:
            raise MissingDependency(f"the logger {name} needs {SINKS[name].library}", fix=f"pip install 'saehub[{EXTRA}]'")
        self.name = name
        self._sink: Sink | None = None
        self._run_dir: Path | None = None
        self._last: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """One event."""
        if event.kind == "run_started":
            self._run_dir = Path(event.data["run_dir"])
            self._sink = SINKS[self.name](self._run_dir, str(event.data.get("recipe") or ""))
        elif self._sink is None:
            return
        elif event.kind == "progress" and event.stage and event.data.get("metrics"):
            step = int(event.data.get("rows") or event.data.get("done") or 0)
            if step > self._last.get(event.stage, -1):  # a resumed training tells its last steps again
                self._last[event.stage] = step
                self._sink.put(training(event.stage, event.data["metrics"]), step)
        elif event.kind in ("run_finished", "interrupted"):
            self.close(finished=event.kind == "run_finished")

    def close(self, *, finished: bool = False) -> None:
        """Put the measurements of results.json if the run finished, and close the sink; nothing if that happened already."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            found = dict(measurements(self._run_dir)) if finished and self._run_dir else {}
            if found:
                sink.put(found, max(self._last.values(), default=0))
        finally:
            sink.close()


def training(stage: str, metrics: dict[str, Any]) -> dict[str, float]:
    """`train/native-k32/fvu` and so on, of the finite ones."""
    return {f"train/{stage.removeprefix('train/')}/{name}": float(value) for name, value in metrics.items() if _finite(value)}


def measurements(run_dir: Path) -> Iterator[tuple[str, float]]:
    """(`native-k32/in_sample/fvu`, value) of every number in results.json."""
    from saehub.report.run_folder import RunFolder

    for row in RunFolder(Path(run_dir)).measurements:
        if row.status == "ok" and _finite(row.value):
            yield f"{'+'.join(row.subjects) or 'model'}/{row.dataset or 'weights'}/{row.metric}", float(row.value)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def loggers(names: Iterable[str]) -> list[Logger]:
    """One for each name, each once."""
    return [Logger(name) for name in dict.fromkeys(names)]
