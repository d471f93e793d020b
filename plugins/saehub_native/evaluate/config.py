"""The settings of `native/core` in a recipe in; a checked, torch-free dataclass out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from saehub_native.evaluate.definitions import Definition


@dataclass(frozen=True)
class CoreConfig:
    """Settings of `native/core`; the defaults measure everything on every row of each dataset."""

    dead_rate: float = 1e-5
    """r0: a latent that never fired is dead when the 95 % upper bound on its firing rate, 3/N over N effective tokens, is at most this."""
    loss: bool = True
    """Measure cross-entropy and KL with the reconstruction spliced into the model: the costly part."""
    loss_sequences: int | None = None
    """Use only the first so many sequences of each dataset for cross-entropy and KL; None uses all. All other metrics use every row."""
    baselines: bool | tuple[Literal["pca", "random", "identity"], ...] = True
    """What is put beside each autoencoder. True: `[pca, random]`, PCA with the same k, and a random dictionary with the same k and width.
    `identity` is the activations themselves, spliced back: everything recovered, or the splice is at fault. (A frozen decoder is trained: see
    `freeze_decoder` of the native trainers.)"""
    pca_k: int | None = None
    """k of the baselines; None takes the architecture's own k, or else the mean L0 on the first dataset, rounded."""
    histogram_bins: int = 40
    """Bins of the feature-density histogram, equal in log10 of the firing rate between 1e-8 and 1."""
    memory: int = 2 * 2**30
    """Scratch memory in bytes that logits, features and gathered directions may take at a time; it sets chunk sizes, never results."""

    def __post_init__(self) -> None:
        if not 0 < self.dead_rate < 1:
            raise ValueError(f"dead_rate is {self.dead_rate}; a rate lies between 0 and 1, such as 1e-5")
        for name in ("loss_sequences", "pca_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give a whole number from 1, or leave it out")
        if self.histogram_bins < 1:
            raise ValueError(f"histogram_bins is {self.histogram_bins}; give a whole number from 1")
        if self.memory < 2**20:
            raise ValueError(f"memory is {self.memory} bytes; at least 1048576 (1 MiB) is needed")

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of `baselines`."""
        return (("pca", "random") if self.baselines else ()) if isinstance(self.baselines, bool) else tuple(dict.fromkeys(self.baselines))

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_native.evaluate.definitions import DEFINITIONS

        return DEFINITIONS
