"""A folder of stored activations in; the same rows as an extractor session, without model or text, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from saehub.api import Rows
from saehub.data.order import permutation
from saehub.errors import FormatError, UsageError, did_you_mean
from saehub_native.extract_config import FilesConfig
from saehub_native.files_layout import Column, Layout

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset


class FilesExtractor:
    """`native/files`: activations that one has already. Evaluators that need the model or text cannot run on them."""

    def __init__(self, config: FilesConfig):
        self.config = config

    def open(self, model: ModelHandle | None, tokens: TokenDataset | None, sites: Sequence[str], *, lm_batch: int) -> FilesSession:
        """Check `sites` against the folder. A batch is `lm_batch` consecutive rows."""
        layout = Layout.scan(self.config)
        for site in map(str, sites):
            if site not in layout.sites:
                raise UsageError(
                    f"the files hold no site {site!r}{did_you_mean(site, layout.sites)}",
                    where="extract.sites",
                    why=f"there are: {', '.join(layout.sites)}",
                    fix="correct the site, or say which tensor it is under extract.with.names",
                )
        return FilesSession(layout, list(map(str, sites)), lm_batch)


class FilesSession:
    """Batches in an order drawn once and for all, because stored rows tend to lie in the order of the text."""

    def __init__(self, layout: Layout, sites: Sequence[str], lm_batch: int):
        self.layout, self.sites = layout, sites
        self.size = lm_batch
        self.n_batches = -(-layout.n_rows // self.size)
        self.widths = {site: layout.widths[site] for site in sites}
        self._order = permutation(self.n_batches, "files")
        self._kept: np.ndarray | None = None

    def _range(self, batch: int) -> tuple[int, int]:
        if not 0 <= batch < self.n_batches:
            raise IndexError(f"batch {batch} of {self.n_batches}")
        i = int(self._order[batch]) * self.size
        return i, min(i + self.size, self.layout.n_rows)

    @property
    def data_hash(self) -> str:
        """SHA-256 over the files."""
        return self.layout.content_hash()

    def rows(self, batch: int) -> Rows:
        """The rows of one batch, on the CPU, in the files' dtype. FormatError, with file and row, where one that is kept is not finite."""
        i, j = self._range(batch)
        ids = {name: torch.from_numpy(column.read(i, j).astype(np.int64)) for name, column in self.layout.ids.items()}
        if self.layout.context is not None:
            row_N = torch.arange(i, j)
            ids.setdefault("positions", row_N % self.layout.context)
            ids.setdefault("sequences", row_N // self.layout.context)
        keep_N = torch.from_numpy(self.layout.keep(i, j))
        acts = {site: _tensor(self.layout.sites[site], i, j) for site in self.sites}
        for site, acts_ND in acts.items():
            _refuse_broken(self.layout.sites[site], acts_ND, keep_N, i)
        return Rows(acts, keep_N, ids.get("token_ids"), ids.get("positions"), ids.get("sequences"))

    def kept(self, batch: int) -> int:
        """Rows of that batch that are not excluded."""
        if self._kept is None:
            starts = range(0, self.layout.n_rows, self.size)
            self._kept = np.array([int(self.layout.keep(i, min(i + self.size, self.layout.n_rows)).sum()) for i in starts])
        return int(self._kept[self._order[batch]])

    def close(self) -> None:
        """Files are mapped, not held."""


def _refuse_broken(column: Column, acts_ND: torch.Tensor, keep_N: torch.Tensor, first: int) -> None:
    finite_ND = acts_ND.isfinite()
    if finite_ND.all():
        return
    bad_N = ~finite_ND.all(1) & keep_N
    if bad_N.any():
        row = first + int(bad_N.nonzero()[0, 0])
        file, inside = column.place(row)
        raise FormatError(
            f"{file}: {inside} of {column.name!r} holds NaN or infinite numbers",
            why=f"row {row:,} of the folder, counted from 0; {int(bad_N.sum()):,} of the {len(bad_N):,} rows that were read with it",
            fix="leave such rows out, or write them again (float16 ends at 65,504: store bfloat16 or float32)",
        )


def _tensor(column: Column, i: int, j: int) -> torch.Tensor:
    array = np.ascontiguousarray(column.read(i, j))
    if column.kind == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
