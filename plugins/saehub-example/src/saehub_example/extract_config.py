"""The `with:` of a recipe in; checked settings of the extractor out. No torch here: a plan reads these without loading anything heavy."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BarsConfig:
    """Settings of `example/bars`."""

    images: int = 4096
    """How many images there are; one row each."""
    size: int = 12
    """Pixels along each side."""
    bars: int = 3
    """Bars in an image."""
    seed: int = 0
    """Other images, and other weights of the network."""

    def describe(self) -> dict[str, Any]:
        """What a plan must know of activations that come without text: widths, rows, and a hash of everything that decides them."""
        if min(self.images, self.bars) < 1 or self.size < 8:
            from saehub.errors import UsageError

            raise UsageError(
                f"{self.images} images of {self.size} pixels with {self.bars} bars", fix="at least one image and one bar, and 8 pixels a side"
            )
        digest = hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()
        return {"widths": {"conv.0": 8, "conv.1": 16}, "rows": self.images, "hash": digest}
