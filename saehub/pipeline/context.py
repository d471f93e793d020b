"""A plan in; what its stages share while they run (model, token streams, extractor, workers, events, the wish to stop) out, each made once."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import StageFailed
from saehub.pipeline.components import Components
from saehub.pipeline.environment import describe
from saehub.pipeline.events import Events
from saehub.pipeline.plan import Plan, Stage

if TYPE_CHECKING:
    from saehub.api import ExtractorSession
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset


class Context:
    """Shared by all stages of one run; heavy things are loaded on first use."""

    def __init__(self, plan: Plan, events: Events):
        self.plan, self.events = plan, events
        self.stop = threading.Event()
        self.components = Components(log_dir=plan.run_dir)
        self.facts: dict[str, Any] = {"resume": "not needed"}
        self._tokens: dict[str, TokenDataset] = {}

    @cached_property
    def device(self) -> str:
        """Torch device of the language model and of training."""
        from saehub.data.model import resolve_device

        return resolve_device(self.plan.model.device if self.plan.model else "auto")

    @property
    def environment(self) -> dict[str, Any]:
        """What is recorded beside results made now."""
        import torch  # noqa: F401  (loaded, so that threads and device are recorded)

        return describe(self.device)

    @cached_property
    def model(self) -> ModelHandle | None:
        """The language model, loaded once."""
        if self.plan.model is None:
            return None
        from saehub.data.model import ModelHandle

        self.events("log", None, text=f"loading {self.plan.model.name}")
        return ModelHandle.load(self.plan.model)

    def tokens(self, name: str) -> TokenDataset:
        """The token dataset of stage `tokens/<name>`."""
        if name not in self._tokens:
            from saehub.data.tokens import TokenDataset

            self._tokens[name] = TokenDataset.open(self.plan.stage(f"tokens/{name}").where / "tokens")
        return self._tokens[name]

    @cached_property
    def extractor(self) -> Any:
        """The recipe's extractor."""
        extract = self.plan.recipe.extract
        registered = self.plan.catalog.find("extractor", extract.uses)
        from saehub.recipe.check import make_config

        return self.components.make(registered, make_config(registered, extract.with_))

    def open_extractor(self, tokens: TokenDataset | None, sites: list[str]) -> ExtractorSession:
        """The extractor over a token dataset (None: files of activations)."""
        return self.extractor.open(self.model, tokens, sites, lm_batch=self.plan.recipe.extract.lm_batch)

    def manifest(self, stage: Stage, **more: Any) -> dict[str, Any]:
        """What is written beside a finished stage."""
        return {"schema": 1, "stage": stage.id, "kind": stage.kind, "key": stage.key, "environment": self.environment, **more}

    def log_dir(self) -> Path:
        """The run folder."""
        return self.plan.run_dir

    def close(self) -> None:
        """End the workers."""
        self.components.close()


def stage_error(stage: Stage, error: BaseException) -> StageFailed:
    """An unexpected exception of a stage as an error that names the stage and keeps the words."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    said = f"{type(error).__name__}: {error}"
    return StageFailed(f"stage {stage.id} failed", where=where, said=said, fix="SAEHUB_TRACE=1 shows the whole trace; finished stages are kept, the same command goes on")
