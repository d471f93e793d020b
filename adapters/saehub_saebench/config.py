"""The settings of the saebench evaluators in a recipe in; checked, torch-free dataclasses with SAEBench's own defaults out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from saehub_saebench.definitions import Definition

SEEDS = (42, 43, 44)
"""SAEBench's own seed and two more: without them there is no error bar."""


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or any(not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds is {list(seeds)}; give one or more different whole numbers, such as [42, 43, 44]")


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(item is not None and item < 1 for item in values) or not values:
            raise ValueError(f"{name} is {value}; whole numbers from 1 are needed")


@dataclass(frozen=True)
class CoreConfig:
    """Settings of `saebench/core`: the paper's are 200 and 2000 batches of 16 × 128 tokens of openwebtext."""

    n_eval_reconstruction_batches: int | None = None
    """Batches for cross-entropy and KL under each seed; None: all whole batches there are."""
    n_eval_sparsity_variance_batches: int | None = None
    """Batches for reconstruction and sparsity under each seed; None: all whole batches there are."""
    batch_size_prompts: int = 16
    """Sequences a batch. SAEBench's `mse` and legacy explained variance depend on it: 16 in everything published."""
    exclude_special_tokens_from_reconstruction: bool = True
    """Leave BOS, EOS and padding rows as they are when the reconstruction is put into the model, as in the paper."""
    seeds: tuple[int, ...] = SEEDS
    """Each seed reads sequences of its own: the dataset is shuffled once and cut into as many parts as there are seeds."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches", "batch_size_prompts")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("core")


@dataclass(frozen=True)
class MetaStructureConfig:
    """Settings of `saebench/meta_structure`."""

    width_ratio: float = 0.25
    """Latents of the meta-SAE, as a share of the SAE's."""
    k: int = 4
    """Active meta-latents a decoder row, on average."""
    train_steps: int = 1500
    """Steps of the meta-SAE's training."""
    train_batch_size: int = 1024
    """Decoder rows a step."""
    learning_rate: float = 5e-4
    """Adam's."""
    seeds: tuple[int, ...] = SEEDS
    """Initialisation and batches of the meta-SAE."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "k", "train_steps", "train_batch_size")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("meta_structure")


SMALL_PROBES = ("117_us_state_FL", "118_us_state_CA", "119_us_state_TX")
"""Short texts, a thousand each: seconds on a small model. The paper's set is all 113."""


@dataclass(frozen=True)
class SaeProbesConfig:
    """Settings of `saebench/sae_probes`."""

    dataset_names: tuple[str, ...] = SMALL_PROBES
    """Of the 113 in the sae-probes wheel; the default is three small ones."""
    ks: tuple[int, ...] = (1, 2, 5)
    """Latents that a probe may use."""
    reg_type: Literal["l1", "l2"] = "l1"
    """Penalty of the probe; its strength is cross-validated."""
    include_llm_baseline: bool = True
    """Also probe the activations themselves."""
    baseline_method: str = "logreg"
    """How."""
    max_seq_len: int = 1024
    """Tokens of a text that are read, at most (from its end)."""
    llm_batch_size: int = 32
    """Texts in one forward pass."""
    seeds: tuple[int, ...] = SEEDS
    """Splits into training and test texts."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "ks", "max_seq_len", "llm_batch_size")
        if not self.dataset_names:
            raise ValueError("dataset_names is empty; name one or more, such as [117_us_state_FL]")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("sae_probes")
