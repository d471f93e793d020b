"""pytest's session in; fixtures for authors of saehub plugins out. Loaded into every pytest where saehub is installed, so it imports only pytest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(scope="session")
def saehub_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saehub_tiny_model("llama" | "gpt2" | "gpt_neox")`: the folder of a tiny random language model with its byte tokenizer, built once."""
    built: dict[str, Path] = {}

    def build(family: str = "llama") -> Path:
        if family not in built:
            from saehub.testing.toys import tiny_model

            built[family] = tiny_model(tmp_path_factory.mktemp("saehub") / f"tiny-{family}", family=family)
        return built[family]

    return build


@pytest.fixture(scope="session")
def saehub_planted() -> Callable[..., tuple[Tensor, Tensor]]:
    """`saehub_planted(n, d, n_features, l0, seed)`: rows with known features, and those features (see `saehub.testing.planted`)."""

    def draw(n: int = 4096, d: int = 32, n_features: int = 64, l0: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        from saehub.testing.toys import planted

        return planted(n, d, n_features, l0, seed)

    return draw
