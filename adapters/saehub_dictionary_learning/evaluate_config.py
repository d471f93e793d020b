"""The settings of `dictionary_learning/evaluate` and `dictionary_learning/nnsight` in a recipe in; checked, torch-free dataclasses out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saehub.api import PlannedSAE


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `dictionary_learning/evaluate`. The library's numbers are means over batches, so its batch sizes are part of their definition."""

    batch: int = 512
    """Rows of one batch, in sequence order; what does not fill a last batch is left out. Variance explained depends on it."""
    max_rows: int | None = None
    """Use only the first so many rows of each dataset. None: all."""
    loss_recovered: bool = True
    """Splice the reconstruction into the model too (`loss_recovered`): five forward passes a batch of text."""
    batch_size: int = 32
    """Sequences of one batch of text, for `loss_recovered`."""
    loss_sequences: int | None = 256
    """Use only the first so many sequences of each dataset for `loss_recovered`. None: all."""

    def __post_init__(self) -> None:
        for name in ("batch", "max_rows", "batch_size", "loss_sequences"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "batch" else 1):
                raise ValueError(f"{name} is {value}; give a whole number from {2 if name == 'batch' else 1}")

    def refusal(self, sae: PlannedSAE) -> str | None:
        """Why an SAE will not be measured, or None; said at plan, and again in the results."""
        if sae.kind not in (None, "autoencoder") or sae.target_site not in (None, sae.site):
            return f"the library compares x̂ with the x that was read; this is a {sae.kind or 'transcoder'}"
        return None
