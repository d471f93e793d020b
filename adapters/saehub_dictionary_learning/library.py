"""A dictionary_learning folder and rows, or a trainer's name, in; what the library itself computes, or the class, out. The only module that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saehub.capabilities import Library

CHUNK_ROWS = 1024
LIBRARY = Library("dictionary_learning", "dictionary-learning", written_for="0.1.0")
USED = ("ae", "optimizer", "scheduler", "update")
"""What the adapter uses of a trainer."""


def trainer_class(path: str, settings: Mapping[str, Any]) -> type:
    """A trainer of the library, `"package.module:Class"`; MissingDependency with both versions if it is gone, or no longer takes a setting."""
    return LIBRARY.take(path, parameters=settings, attributes=["update", "config"])


def build(dict_class: str, sizes: Mapping[str, Any], state: Mapping[str, Tensor], norm_factor: float | None):
    """The library's dictionary in float32 on the CPU, with the stored tensors as they are.

    Not `from_pretrained`: that of AutoEncoder divides the decoder norms out (other features), and all unpickle whatever the file says. A file
    from before 2024-12 lacks k and threshold; a backup in the middle of training is for rows divided by `norm_factor`.
    """
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    if dict_class == "IdentityDict":
        return dictionary.IdentityDict(sizes["activation_dim"])
    found = {"AutoEncoderTopK": AutoEncoderTopK, "BatchTopKSAE": BatchTopKSAE, "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE}.get(
        dict_class
    )
    cls = found or getattr(dictionary, dict_class)
    made = cls(sizes["activation_dim"], sizes["dict_size"], **{key: sizes[key] for key in ("k", "group_sizes") if key in sizes})
    own = {name: made.state_dict()[name] for name in ("k", "threshold") if name in made.state_dict() and name not in state}
    made.load_state_dict({**state, **own})
    if norm_factor is not None:
        made.scale_biases(norm_factor)
    return made.eval()


def run(made: Any, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, dict_size] and reconstruction [n, activation_dim] by `encode` and `decode`, rows flat (some of its classes take axis 1 for
    the latents)."""
    features, reconstructions = [], []
    with torch.no_grad():
        for start in range(0, x_ND.shape[0], CHUNK_ROWS):
            acts_BF = made.encode(x_ND[start : start + CHUNK_ROWS].float())
            features.append(acts_BF)
            reconstructions.append(made.decode(acts_BF))
    return torch.cat(features), torch.cat(reconstructions)
