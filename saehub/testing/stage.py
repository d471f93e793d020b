"""A folder in; a tiny language model, text and packed tokens in it out: what extractors and evaluators are checked on."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from saehub.api import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset
    from saehub.testing.toys import Family

CONTEXT = 16


class Stage:
    """Everything is made on first use, and always the same."""

    def __init__(self, folder: Path, family: Family = "llama"):
        self.folder, self.family = Path(folder), family

    @cached_property
    def spec(self) -> ModelSpec:
        """The tiny model, float32 on the CPU."""
        from saehub.testing.toys import tiny_model

        return ModelSpec(name=str(tiny_model(self.folder / f"tiny-{self.family}", self.family)), device="cpu", attention="eager")

    @cached_property
    def model(self) -> ModelHandle:
        """It, loaded."""
        from saehub.data.model import ModelHandle

        return ModelHandle.load(self.spec)

    def tokens(self, name: str = "in_sample", rows: int = 360, calibration: int = 60) -> TokenDataset:
        """Packed sequences of CONTEXT tokens (one BOS each, excluded) of a text of that name; BOS rows and two letters are left out."""
        from saehub.data.tokens import TokenDataset, TokenPolicy, build
        from saehub.recipe.schema import SourceEntry
        from saehub.testing.toys import tiny_text

        folder = self.folder / "tokens" / f"{name}-{rows}"
        if not (folder / "manifest.json").exists():
            text = self.folder / f"{name}.jsonl"
            text.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny_text(seed=sum(map(ord, name)))))
            policy = TokenPolicy(context=CONTEXT, bos="sequence", exclude=("bos", "pad", 0), template=None)
            build(
                [(SourceEntry(source=str(text), split="all"), 1.0)], self.spec, policy, folder, rows=rows, calibration=calibration, seed=0
            )
        return TokenDataset.open(folder)

    def reference(self, site: str, tokens_BT: Tensor) -> Tensor:
        """The tensor at a site by a plain hook of our own on the whole model, [n, d]."""
        import torch

        from saehub.sites import Site

        tap = Site.parse(site).tap(self.model.shape)
        module = self.model.hf.get_submodule(tap.module)
        seen: list[Tensor] = []

        def before(_module: object, args: tuple, kwargs: dict) -> None:
            seen.append(args[0] if args else next(value for value in kwargs.values() if isinstance(value, torch.Tensor)))

        def after(_module: object, _args: tuple, output: object) -> None:
            seen.append(output if isinstance(output, torch.Tensor) else output[0])

        handle = module.register_forward_pre_hook(before, with_kwargs=True) if tap.io == "in" else module.register_forward_hook(after)
        try:
            with torch.no_grad():
                self.model.hf(tokens_BT)
        finally:
            handle.remove()
        return seen[0].flatten(0, 1).clone()
