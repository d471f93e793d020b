"""Encoder and decoder directions of two SAEs in; both matchings and what they share out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from saehub.checkpoint.sae import SAE
from saehub.seeds import generator
from saehub_native.evaluate.matching.assignment import Assignment, assign, unit

CURVE = tuple(round(0.05 * i, 2) for i in range(2, 20))
"""Thresholds of the curve of shared latents: 0.10 … 0.95."""


@dataclass(frozen=True)
class Dictionary:
    """The directions of an SAE's latents."""

    encoder_FD: Tensor
    """[F, d_in]."""
    decoder_FD: Tensor
    """[F, d_out]."""

    @classmethod
    def of(cls, sae: SAE) -> Dictionary:
        """From an SAE's W_enc [d_in, F] and W_dec [F, d_out]; an architecture without an encoder of its own reads along its decoder."""
        tensors = sae.tensors()
        decoder_FD = tensors["W_dec"].float()
        return cls(tensors["W_enc"].T.float() if "W_enc" in tensors else decoder_FD, decoder_FD)

    @classmethod
    def random(cls, latents: int, width: int, seed: int, which: int) -> Dictionary:
        """Random directions, encoder = decoder."""
        rows_FD = torch.randn(latents, width, generator=generator(seed, "native/stability", "random", latents, width, which))
        return cls(rows_FD, rows_FD)


Match = Callable[..., Assignment]


class Pair:
    """Two dictionaries and their matchings, each made when it is first asked for; arrays are over the latents of the first, -1 and NaN where unmatched."""

    def __init__(self, a: Dictionary, b: Dictionary, match: Match = assign):
        self.a, self.b, self.match = a, b, match

    @cached_property
    def decoder(self) -> Assignment:
        """Greatest total decoder cosine."""
        return self.match(self.a.decoder_FD, self.b.decoder_FD)

    @cached_property
    def decoder_absolute(self) -> Assignment:
        """Greatest total |decoder cosine|."""
        return self.match(self.a.decoder_FD, self.b.decoder_FD, absolute=True)

    @cached_property
    def encoder(self) -> Assignment:
        """Greatest total encoder cosine."""
        if self.a.encoder_FD is self.a.decoder_FD and self.b.encoder_FD is self.b.decoder_FD:
            return self.decoder
        return self.match(self.a.encoder_FD, self.b.encoder_FD)

    @cached_property
    def matched_F(self) -> np.ndarray:
        """bool: has a partner among the decoders (all latents of the narrower SAE)."""
        return self.decoder.partner_N >= 0

    @cached_property
    def agreed_F(self) -> np.ndarray:
        """bool: the same partner in both matchings."""
        return self.matched_F & (self.encoder.partner_N == self.decoder.partner_N)

    def shared_F(self, threshold: float) -> np.ndarray:
        """bool: the same partner in both, and cosines above `threshold` in both."""
        low_F = np.fmin(np.nan_to_num(self.encoder.similarity_N, nan=-1.0), np.nan_to_num(self.decoder.similarity_N, nan=-1.0))
        return self.agreed_F & (low_F > threshold)

    @property
    def pairs(self) -> int:
        """Latents that have a partner: the denominator of every share."""
        return int(self.matched_F.sum())

    def curve(self) -> list[float]:
        """Shared share at every threshold of `CURVE`."""
        return [float(self.shared_F(t).sum() / self.pairs) for t in CURVE]

    @property
    def gap(self) -> float:
        """The greatest certified gap of the matchings made so far."""
        made = [self.__dict__[name] for name in ("decoder", "decoder_absolute", "encoder") if name in self.__dict__]
        return max(found.gap for found in made)


def subspace_overlaps(a_FD: Tensor, b_FD: Tensor, ranks: list[int]) -> list[float]:
    """‖U_Aᵀ U_B‖_F² / r for each r, U the r leading right singular vectors of the unit rows (from the d × d second moments, float64)."""

    def leading(rows_FD: Tensor) -> Tensor:
        u_FD = unit(rows_FD.double())
        return torch.linalg.eigh(u_FD.T @ u_FD).eigenvectors.flip(1)

    a_DD, b_DD = leading(a_FD), leading(b_FD)
    return [float((a_DD[:, :r].T @ b_DD[:, :r]).square().sum() / r) for r in ranks]


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and its standard error (None for fewer than two)."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
