"""An extractor's language-model batches in; pieces of whole sequences, small enough for logits, with a sequence index for every row, out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saehub.api import Rows

BLOCK = 128
"""Rows that stand in for a sequence where the source knows none."""


@dataclass
class Piece:
    """Some whole sequences of a dataset, excluded rows included (n rows, of which m are kept)."""

    acts: dict[str, Tensor]
    """site -> [n, d]."""
    keep_N: Tensor
    """bool [n], on the activations' device."""
    units_N: np.ndarray
    """int64 [n], ascending: the sequence of each row."""
    tokens_N: Tensor | None
    """int64 [n]."""
    context: int | None
    """Rows a sequence; None where there are no sequences."""

    def __post_init__(self) -> None:
        kept_N = self.keep_N.cpu().numpy()
        self.units_M = self.units_N[kept_N]
        """int64 [m], ascending: the sequence of each kept row."""

    def kept(self, site: str) -> Tensor:
        """[m, d]: the kept rows at `site`."""
        return self.acts[site][self.keep_N]

    def whole(self, site: str) -> Tensor:
        """[sequences, context, d], excluded rows included: for an SAE that is not row-wise."""
        return self.acts[site].view(-1, self.context, self.acts[site].shape[-1])

    @property
    def sequences(self) -> int:
        """Whole sequences; 0 where there are none."""
        return len(self.units_N) // self.context if self.context else 0


def pieces(batches: Iterable[Rows], context: int | None, at_once: int | None) -> Iterator[Piece]:
    """Cut every batch into pieces of at most `at_once` sequences of `context` rows (None: leave batches whole)."""
    before = 0
    for rows in batches:
        n = len(rows.keep_N)
        units_N = rows.sequences_N.cpu().numpy() if rows.sequences_N is not None else np.arange(before, before + n, dtype=np.int64) // BLOCK
        before += n
        length = context if context and rows.sequences_N is not None and n % context == 0 else None
        step = at_once * length if at_once and length else max(n, 1)
        for at in range(0, n, step):
            part = slice(at, min(at + step, n))
            acts = {site: acts_ND[part] for site, acts_ND in rows.acts.items()}
            device = next(iter(acts.values())).device if acts else torch.device("cpu")
            tokens_N = rows.token_ids_N[part] if rows.token_ids_N is not None else None
            yield Piece(acts, rows.keep_N[part].to(device), units_N[part], tokens_N, length)
