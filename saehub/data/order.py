"""A length and seed parts in; a permutation that no library version can change out."""

from __future__ import annotations

import numpy as np

from saehub.seeds import derive


def permutation(n: int, *parts: object) -> np.ndarray:
    """int64 [n]: the stable argsort of n words of PCG64's raw stream, which numpy fixes for good (its `permutation` method it does not)."""
    words = np.random.PCG64(derive("permutation", *parts)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)
