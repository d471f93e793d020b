"""Rows in pieces of any size in; batches of one size out, with the rows that are left over carried to the next piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Batcher:
    """Cuts a stream of rows into batches. `carry` (at most batch - 1 rows a site) is part of a resume state: set it to go on from there."""

    def __init__(self, batch: int):
        if batch < 1:
            raise ValueError(f"batch is {batch}, at least 1 is needed")
        self.batch = batch
        self.carry: dict[str, Tensor] = {}

    @property
    def carried(self) -> int:
        """Rows held back."""
        return next(iter(self.carry.values())).shape[0] if self.carry else 0

    def feed(self, rows: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield site -> [batch, d] for `rows` (site -> [n, d], same n for all). Consumed to the end, it leaves the rest in `carry`."""
        held = self.carried
        n = held + next(iter(rows.values())).shape[0]
        at = 0
        while at + self.batch <= n:
            batch = {site: self._take(site, x_ND, held, at, at + self.batch) for site, x_ND in rows.items()}
            at += self.batch
            if at >= held:
                self.carry = {}
            yield batch
        if at < held:
            self.carry = {site: torch.cat([self.carry[site], x_ND]) for site, x_ND in rows.items()}
        else:  # a copy, so that the block can be freed
            self.carry = {site: x_ND[at - held :].clone() for site, x_ND in rows.items()} if at < n else {}

    def _take(self, site: str, x_ND: Tensor, held: int, start: int, end: int) -> Tensor:
        if start >= held:
            return x_ND[start - held : end - held]
        return torch.cat([self.carry[site][start:], x_ND[: end - held]])
