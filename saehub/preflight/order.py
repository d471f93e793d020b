"""A token dataset and a plan in; the order in which its rows reach a trainer, measured on the first block of the stream itself, out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saehub.activations.blocks import BlockStream
from saehub.api import Rows

if TYPE_CHECKING:
    from saehub.data.tokens import TokenDataset


@dataclass(frozen=True)
class Order:
    """What consecutive rows of the stream's first block have in common. A piece is one packed sequence."""

    rows: int
    """Rows looked at."""
    pieces: int
    """Pieces that they come from."""
    text: int
    """Pieces of the whole training text."""
    same: float
    """Share of pairs of consecutive rows in a batch that come from the same piece."""
    same_expected: float
    """The same in a random order of these rows: Σ n_p (n_p - 1) / (N (N - 1)), n_p rows of piece p."""
    beside: float
    """Share of such pairs that come from pieces which stand beside each other in the text."""
    beside_expected: float
    """The same for pieces drawn at random from the whole text, in a random order: 2 / pieces of the text."""
    pairs: int
    """Pairs counted."""
    in_batch: float
    """Rows a batch has of each piece in it, on average."""

    def ordered(self) -> bool:
        """Whether rows follow each other's text far more than chance allows: thrice, and five standard errors above."""
        return any(
            found > 3 * expected and found - expected > 5 * math.sqrt(max(expected, 1 / self.pairs) / self.pairs)
            for found, expected in ((self.same, self.same_expected), (self.beside, self.beside_expected))
        )


def measure(piece_N: np.ndarray, place_N: np.ndarray, text: int, batch: int) -> Order | None:
    """Rows in the order of delivery: their piece, and the place of that piece in the text (int64 [N]); None for fewer than two rows."""
    n = len(piece_N)
    batch = max(1, min(batch, n))
    inside_P = np.arange(1, n) % batch != 0  # the next row is of the same batch
    pairs = int(inside_P.sum())
    if not pairs:
        return None
    same_P, gap_P = piece_N[1:] == piece_N[:-1], np.abs(np.diff(place_N))
    counts = np.unique(piece_N, return_counts=True)[1].astype(np.float64)
    whole = piece_N[: n // batch * batch].reshape(-1, batch)
    distinct = np.mean([len(np.unique(row)) for row in whole])
    return Order(
        n, len(counts), text, float(same_P[inside_P].mean()), float((counts * (counts - 1)).sum() / (n * (n - 1.0))),
        float((gap_P[inside_P] == 1).mean()), min(1.0, 2 / max(text, 1)), pairs, float(batch / distinct),
    )  # fmt: skip


class _Text:
    """An extractor session that runs no model: which rows there are, and whose."""

    widths: dict[str, int] = {}

    def __init__(self, tokens: TokenDataset, lm_batch: int):
        self.tokens, self.lm_batch, self.n_batches = tokens, lm_batch, tokens.n_batches(lm_batch)

    def kept(self, batch: int) -> int:
        return self.tokens.kept(*self.tokens.batch_range(batch, self.lm_batch))

    def rows(self, batch: int) -> Rows:
        import torch

        i, j = self.tokens.batch_range(batch, self.lm_batch)
        ids_N, context = self.tokens.tokens(i, j).flatten(), self.tokens.context
        return Rows({}, self.tokens.keep(i, j).flatten(), ids_N, torch.arange(context).repeat(j - i), torch.arange(i, j).repeat_interleave(context))


def first_block(tokens: TokenDataset, *, seed: int, lm_batch: int, batches_per_block: int, rows: int, batch: int) -> Order | None:
    """The order of the rows that a trainer gets first: the stream's own block 0, without its activations. `rows` is cut to one epoch."""
    stream = BlockStream(
        _Text(tokens, lm_batch), sites=(), seed=seed, batches_per_block=batches_per_block, dtype="float32", rows=min(rows, tokens.rows),
        calibration_batches=tokens.calibration_batches(lm_batch), keep_hashes=False,
    )  # fmt: skip
    if not stream.n_blocks:
        return None
    piece_N = stream.block(0).sequences_N.numpy()
    training = tokens.n_sequences - tokens.calibration_sequences
    return measure(piece_N, tokens.places(piece_N), training, batch)
