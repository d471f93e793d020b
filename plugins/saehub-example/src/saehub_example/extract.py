"""Nothing but settings in; rows of a small convolutional network that looks at images of bars out: an extractor without text or transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saehub import UsageError
from saehub.api import Rows
from saehub.seeds import generator
from saehub_example.extract_config import BarsConfig


class BarsExtractor:
    """Implements `saehub.api.Extractor`."""

    def __init__(self, config: BarsConfig):
        self.config = config

    def open(self, model: Any, tokens: Any, sites: Sequence[str], *, lm_batch: int) -> BarsSession:
        """`model` and `tokens` are None: the registration asks for neither. Without text, `lm_batch` is the number of rows a batch."""
        known = self.config.describe()["widths"]
        for site in sites:
            if site not in known:
                raise UsageError(f"example/bars has no site {site!r}", where="extract.sites", fix=f"one of {', '.join(known)}")
        return BarsSession(self.config, list(sites), lm_batch)


class BarsSession:
    """Batch `i` is a pure function of `i`: image n is drawn from a generator seeded with n.

        conv.0 = mean over pixels of relu(K0 * image)        conv.1 = mean over pixels of relu(K1 * relu(K0 * image))
    """

    def __init__(self, config: BarsConfig, sites: list[str], size: int):
        self.config, self.sites, self.size = config, sites, size
        self.widths = {site: config.describe()["widths"][site] for site in sites}
        self.n_batches = -(-config.images // size)
        draw = generator("bars network", config.seed)
        self.kernels = [torch.randn(8, 1, 3, 3, generator=draw), torch.randn(16, 8, 3, 3, generator=draw) / 8**0.5]

    def _range(self, batch: int) -> range:
        if not 0 <= batch < self.n_batches:
            raise UsageError(f"there is no batch {batch}", why=f"{self.n_batches} batches exist")
        return range(batch * self.size, min((batch + 1) * self.size, self.config.images))

    def _image(self, number: int) -> Tensor:
        """[1, size, size]: bars of random brightness, in rows or columns."""
        draw = generator("bars image", self.config.seed, number)
        image = torch.zeros(self.config.size, self.config.size)
        for _ in range(self.config.bars):
            place, across = int(torch.randint(self.config.size, (), generator=draw)), bool(torch.randint(2, (), generator=draw))
            line = image[place] if across else image[:, place]
            line += 0.5 + torch.rand((), generator=draw)
        return image[None]

    @torch.no_grad()
    def rows(self, batch: int) -> Rows:
        """One row an image, float32, image after image."""
        numbers = self._range(batch)
        found, hidden = {}, torch.stack([self._image(number) for number in numbers])
        for layer, kernel in enumerate(self.kernels):
            hidden = F.conv2d(hidden, kernel).relu()
            found[f"conv.{layer}"] = hidden.mean((2, 3))
        keep_N = torch.ones(len(numbers), dtype=torch.bool)
        return Rows({site: found[site].clone() for site in self.sites}, keep_N, sequences_N=torch.tensor(numbers), positions_N=torch.zeros(len(numbers), dtype=torch.int64))

    def kept(self, batch: int) -> int:
        """Every image counts."""
        return len(self._range(batch))

    def close(self) -> None:
        """Nothing is held."""
