"""A ranker's int8 copies in; the tiles, the rows' pieces and the room that the scan of cpu_scan.py works with, out."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saehub_native.kernels.team import pieces

if TYPE_CHECKING:
    from saehub_native.kernels.rank import Ranker
    from saehub_native.kernels.team import Team

ROWS_A_CHUNK = 516
"""Their int8 copies fit in the second cache; a multiple of what `multiply` takes."""
SPARSE_FROM = 8
"""Latents of the sample for each one that reaches the bound there: with fewer a product that returns all scores does as well."""
TILES_A_PIECE, ROOM_BYTES = 16, 32 << 20


class Scanner:
    """For an int8 ranking product, where the processor has the instructions and no faster unit for it (AMX)."""

    def __init__(self, team: Team):
        from saehub_native.kernels import cpu_scan

        self.loops, self.team = cpu_scan, team
        self.there = cpu_scan.THERE and not getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        self._packed = 0
        self._tile_TSL = torch.empty(0, 0, 0, dtype=torch.int32)
        self._own = threading.local()  # each thread's room

    def suits(self, n: int, need: int) -> bool:
        """Whether a scan takes less time than a product that returns all scores."""
        return self.there and SPARSE_FROM * rank(need, self.sample(n), n) <= self.sample(n)

    def sample(self, n: int) -> int:
        """Latents in every eighth tile."""
        size, every = self.loops.LATENTS, self.loops.EVERY
        return sum(min(size, n - first) for first in range(0, n, size * every))

    def tiles(self, ranker: Ranker) -> Any:
        """The weights as `cpu_scan.scan` takes them, made anew when the ranker's copies have changed."""
        if self._packed != ranker.changes:
            low_FS = _fours(ranker.low8_FD, -128)
            n, steps = low_FS.shape
            count = -(-n // self.loops.LATENTS)
            if self._tile_TSL.shape[:2] != (count, steps):
                self._tile_TSL = torch.zeros(count, steps, self.loops.LATENTS, dtype=torch.int32)
            self.team.run(*pieces(self.loops.pack_tiles, count, TILES_A_PIECE, (low_FS.numpy(), self._tile_TSL.numpy())))
            self._packed = ranker.changes
        return self._tile_TSL.view(torch.int8).numpy()

    def rows(self, low_BD: Tensor) -> Any:
        """int8 rows, as many columns as `multiply` reads."""
        return _fours(low_BD, 0).view(torch.int8).numpy()

    def chunk(self, n_rows: int, places: int) -> int:
        """Rows a piece."""
        share, fit = -(-n_rows // (4 * torch.get_num_threads())), ROOM_BYTES // (8 * places)
        size = max(64, min(ROWS_A_CHUNK, fit, share))
        even = -(-n_rows // -(-n_rows // size))
        return -(-even // self.loops.ROWS) * self.loops.ROWS

    def places(self, n: int, need: int) -> int:
        """Candidates of a row that are kept: the sample, and what the bound lets through, but for one row in thousands."""
        best, sample = rank(need, self.sample(n), n), self.sample(n)
        return max(sample, min(n, math.ceil((best + 4 * math.sqrt(best) + 4) * n / sample)))

    def room(self, n_rows: int, places: int) -> tuple[Any, Any, Any, Any]:
        """This thread's room for bounds, candidates, the bits of their scores, and their numbers."""
        width, held = apart(places + self.loops.SPARE), self._own.__dict__
        for name, kind, size in (
            ("bound", np.float32, n_rows),
            ("latent", np.int32, n_rows * width),
            ("bits", np.int32, n_rows * width),
            ("count", np.int64, n_rows),
        ):
            if name not in held or held[name].size < size:
                held[name] = np.empty(size, kind)
        latent_RM, bits_RM = (held[name][: n_rows * width].reshape(n_rows, width) for name in ("latent", "bits"))
        return held["bound"][:n_rows], latent_RM, bits_RM, held["count"][:n_rows]


def rank(need: int, sample: int, n: int) -> int:
    """Which score of the sample, from above, is a row's bound. The place of the need-th score of all in the sample is, nearly, a Gamma variable
    of mean and variance a = need · sample / n."""
    a = need * sample / n
    return math.ceil(a + 2.5 * math.sqrt(a) + 1)


def apart(width: int) -> int:
    """At least so many numbers of 4 bytes a row, such that the same column of successive rows falls on all sets of a cache, not on a few."""
    return (-(-width // 16) | 1) * 16


def _fours(low_ND: Tensor, fill: int) -> Tensor:
    """int8 rows as int32 [N, ⌈D/4⌉]; places that are not there hold `fill`."""
    beyond = -low_ND.shape[1] % 4
    return (torch.nn.functional.pad(low_ND, (0, beyond), value=fill) if beyond else low_ND).view(torch.int32)
