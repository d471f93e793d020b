"""A width in; the SAE that changes nothing out: with it SAEBench fills its caches of the model's activations and probes, which no real SAE enters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Identity:
    """Features are the activations themselves; config of the SAE that it stands in for."""

    def __init__(self, cfg: Any, width: int, device: torch.device, dtype: torch.dtype):
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.W_dec = torch.eye(width, device=device, dtype=dtype)
        self.W_enc = self.W_dec

    def encode(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return x.clone()

    def decode(self, features: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return features

    def to(self, device: Any = None, dtype: Any = None) -> Identity:
        """Itself."""
        return self


class WithoutPadding:
    """An SAE whose features are 0 on rows that are zero: SAEBench zeroes padding and then sums what the decoder makes of it.

    With f(padding) = 0 the ablated and the whole reconstruction of padding are equal, so that it adds nothing to the sum over tokens.
    """

    def __init__(self, sae: Any):
        self._sae = sae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sae, name)

    def encode(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., F]; the same test for padding as SAEBench's."""
        return self._sae.encode(x) * (x.sum(-1, keepdim=True) != 0)

    def to(self, device: Any = None, dtype: Any = None) -> WithoutPadding:
        """Itself: the SAE inside is where it should be."""
        return self
