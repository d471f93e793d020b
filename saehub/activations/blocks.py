"""An extractor session in; shuffled blocks of activation rows, each a pure function of (data, seed, number), and calibration rows out.

    batches of the stream  g = 0, 1, 2, …   epoch e = g // n, batch order[e][g % n]     order[0] = as the session has them
    block b                = kept rows of batches b*m … (b+1)*m - 1, cast to the stream's dtype, permuted by (seed, b)

The last block is cut to the rows asked for. Calibration batches come first in the session and are never part of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saehub.data.model import torch_dtype
from saehub.data.order import permutation
from saehub.errors import StageFailed, UsageError
from saehub.jsonio import hash_json

if TYPE_CHECKING:
    from saehub.api import ExtractorSession


@dataclass
class Block:
    """Consecutive rows of the stream."""

    acts: dict[str, Tensor]
    """site -> [n, d] in the stream's dtype."""
    token_ids_N: Tensor | None
    positions_N: Tensor | None
    sequences_N: Tensor | None
    """Index of each row's sequence in its dataset."""
    first_row: int
    """Rows of the stream before this block."""
    hash: str
    """SHA-256 over the token ids, positions and sequences in the order given out (over the activations where there are no tokens)."""


class BlockStream:
    """The one stream that all trainers eat.

    Args:
        session: an open extractor.
        sites: sites to keep (a subset of the session's).
        seed: of the order, with the block's number.
        batches_per_block: language-model batches whose rows are mixed with one another.
        dtype: float32, bfloat16 or float16; rows are cast before they are shuffled or stored.
        rows: rows to deliver; more than one epoch has is an error unless `repeat`.
        calibration_batches: leading batches that hold calibration rows only.
        repeat: further epochs take the batches in another order, drawn from (seed, epoch).
        device: where blocks are assembled.
    """

    def __init__(
        self,
        session: ExtractorSession,
        *,
        sites: Sequence[str],
        seed: int,
        batches_per_block: int,
        dtype: str,
        rows: int,
        calibration_batches: int = 0,
        repeat: bool = False,
        keep_hashes: bool = True,
        device: str = "cpu",
    ):
        if batches_per_block < 1:
            raise UsageError(
                "a block needs at least one language-model batch", where="extract.block", fix="use at least lm_batch * context tokens"
            )
        self.session, self.sites, self.seed, self.batches_per_block = session, tuple(map(str, sites)), seed, batches_per_block
        self.dtype_name, self.dtype, self.device = dtype, torch_dtype(dtype), device
        self.rows, self.calibration_batches, self.repeat = rows, calibration_batches, repeat
        self.hashes: dict[int, str] | None = {} if keep_hashes else None
        """Block number -> its hash, for blocks that were made here."""
        self._kept = np.array([session.kept(batch) for batch in range(calibration_batches, session.n_batches)], dtype=np.int64)
        self._epoch_rows = int(self._kept.sum())
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._calibration: dict[str, Tensor] | None = None
        if rows > self._epoch_rows and not (repeat and self._epoch_rows):
            raise StageFailed(
                f"{rows:,} rows were asked for, {self._epoch_rows:,} are available",
                where="data.train.tokens",
                why=f"{len(self._kept)} language-model batches after {calibration_batches} for calibration",
                fix=f"set data.train.tokens to at most {self._epoch_rows}, write `repeat: true`, or give more text",
            )
        self._total_batches = self._batches_for(rows)
        self.n_blocks = -(-self._total_batches // batches_per_block)
        self.hash = self.hash_of(self.sites)
        """`hash_of` all sites."""

    def hash_of(self, sites: Sequence[str]) -> str:
        """SHA-256 of what determines the rows of `sites`: the data's hash (token ids, exclusion, order), the seed and the numeric settings.

        Other sites read in the same pass do not enter: a job's stream is the same beside others as alone.
        """
        settings = {name: getattr(self, name) for name in ("seed", "batches_per_block", "rows", "calibration_batches", "repeat")}
        data = getattr(self.session, "data_hash", None)
        data = data if isinstance(data, str) else None
        return hash_json({**settings, "sites": list(sites), "dtype": self.dtype_name, "data": data, "kept": self._kept.tolist()})

    # Which batches, in which order

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's batch order, and the rows before each of its batches (one longer)."""
        if epoch not in self._orders:
            n = len(self._kept)
            order = np.arange(n) if epoch == 0 else permutation(n, "epoch", self.seed, epoch)
            if len(self._orders) > 2:
                self._orders.clear()
            self._orders[epoch] = order, np.concatenate([[0], np.cumsum(self._kept[order])])
        return self._orders[epoch]

    def _rows_before(self, g: int) -> int:
        """Rows in the first `g` batches of the stream."""
        if len(self._kept) == 0:
            return 0
        epoch, within = divmod(g, len(self._kept))
        return epoch * self._epoch_rows + int(self._order(epoch)[1][within])

    def _batches_for(self, rows: int) -> int:
        """The fewest leading batches of the stream that hold `rows` rows."""
        if rows <= 0:
            return 0
        epoch, rest = divmod(rows - 1, self._epoch_rows)
        return epoch * len(self._kept) + int(np.searchsorted(self._order(epoch)[1], rest + 1, side="left"))

    def first_row(self, b: int) -> int:
        """Rows of the stream before block `b`; `first_row(n_blocks)` is `rows`. No model is run."""
        return min(self._rows_before(min(b * self.batches_per_block, self._total_batches)), self.rows)

    # Blocks

    def block(self, b: int) -> Block:
        """Block `b`, whatever was read before it. StageFailed where a kept activation is NaN or infinite."""
        if not 0 <= b < self.n_blocks:
            raise IndexError(f"block {b} of {self.n_blocks}")
        start, end = b * self.batches_per_block, min((b + 1) * self.batches_per_block, self._total_batches)
        batches = []
        for g in range(start, end):
            epoch, within = divmod(g, len(self._kept))
            batches.append(self.calibration_batches + int(self._order(epoch)[0][within]))
        n = self._rows_before(end) - self._rows_before(start)
        first = self.first_row(b)
        order = permutation(n, "block", self.seed, b)
        acts, extras = self._gather(batches, order, self.first_row(b + 1) - first, self.device)
        block = Block(acts, *extras, first_row=first, hash=_hash(acts, extras))
        if self.hashes is not None:
            self.hashes[b] = block.hash
        return block

    def _gather(self, batches: Sequence[int], order: np.ndarray, n_out: int, device: str) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Kept rows of `batches`, the one at `order[k]` put at k, for k < n_out; written into place as they come, so a block is held once."""
        place = np.empty(len(order), dtype=np.int64)  # row r of the batches goes to place[r]
        place[order] = np.arange(len(order))
        place_N = torch.from_numpy(place)
        acts: dict[str, Tensor] = {}
        extras: list[Tensor | None] = [None, None, None]
        done = 0
        for batch in batches:
            rows = self.session.rows(batch)
            keep_N = rows.keep_N.cpu()
            count = int(keep_N.sum())
            target_N = place_N[done : done + count]
            if len(target_N) < count:
                raise StageFailed(
                    f"batch {batch} gave more rows than the extractor had announced", fix="report this to the author of the extractor"
                )
            wanted_N = target_N < n_out
            source_N = keep_N.nonzero().flatten()[wanted_N]
            target_N = target_N[wanted_N]
            for site in self.sites:
                if site not in rows.acts:
                    raise StageFailed(
                        f"the extractor gives no rows for site {site!r}", why=f"it gives {', '.join(rows.acts)}", where="extract.sites"
                    )
                x_ND = rows.acts[site]
                kept_ND = x_ND.index_select(0, source_N.to(x_ND.device)).to(device=device, dtype=self.dtype)
                _check_finite(kept_ND, x_ND, source_N, site, batch, self.dtype_name)
                if site not in acts:
                    acts[site] = torch.empty(n_out, x_ND.shape[1], dtype=self.dtype, device=device)
                acts[site].index_copy_(0, target_N.to(device), kept_ND)
            for k, column_N in enumerate((rows.token_ids_N, rows.positions_N, rows.sequences_N)):
                if column_N is not None:
                    if extras[k] is None:
                        extras[k] = torch.empty(n_out, dtype=torch.int64)
                    extras[k][target_N] = column_N.cpu().to(torch.int64)[source_N]
            done += count
        if done != len(order):
            raise StageFailed(
                f"batches {batches[0]} to {batches[-1]} gave {done} rows, {len(order)} were announced",
                fix="report this to the author of the extractor",
            )
        return acts, extras

    # Calibration rows

    @property
    def calibration_rows(self) -> int:
        """Calibration rows there are."""
        return sum(self.session.kept(batch) for batch in range(self.calibration_batches))

    def calibration(self, n: int) -> dict[str, Tensor]:
        """site -> [n, d] in the stream's dtype: the first `n` of the shuffled calibration rows. StageFailed when there are fewer."""
        total = self.calibration_rows
        if n > total:
            raise StageFailed(
                f"{n:,} calibration rows were asked for, there are {total:,}",
                where="extract.calibration",
                fix=f"set extract.calibration to at least {n}",
            )
        if self._calibration is None:
            batches = range(self.calibration_batches)
            self._calibration = self._gather(batches, permutation(total, "calibration", self.seed), total, "cpu")[0] if total else {}
        return (
            {site: self._calibration[site][:n] for site in self.sites}
            if n
            else {site: torch.empty(0, self.session.widths[site], dtype=self.dtype) for site in self.sites}
        )

    def scale(self, site: str, normalize: str) -> float:
        """The factor on the rows of `site` that `normalize` (none, sqrt_d, unit) asks for, from all calibration rows."""
        return 1.0 if normalize == "none" else scale_of(self.calibration(self.calibration_rows)[site], normalize)


def scale_of(rows_ND: Tensor, normalize: str) -> float:
    """`none`: 1; `sqrt_d`: sqrt(d) / mean |x|; `unit`: 1 / mean |x|, in float64. StageFailed without rows, or where all are zero."""
    if normalize == "none":
        return 1.0
    if normalize not in ("sqrt_d", "unit"):
        raise UsageError(f"normalize: {normalize!r} is not known", where="extract.normalize", fix="use none, sqrt_d or unit")
    if rows_ND.shape[0] == 0:
        raise StageFailed(
            "there are no calibration rows to take a norm from",
            where="extract.calibration",
            fix="set extract.calibration to 16384, or extract.normalize to none",
        )
    total = sum(float(piece.double().norm(dim=1).sum()) for piece in rows_ND.split(8192))
    mean = total / rows_ND.shape[0]
    if mean == 0:
        raise StageFailed("all calibration rows are zero", where="extract.sites", fix="choose another site")
    return (rows_ND.shape[1] ** 0.5 if normalize == "sqrt_d" else 1.0) / mean


def _check_finite(kept_ND: Tensor, raw_ND: Tensor, source_N: Tensor, site: str, batch: int, dtype: str) -> None:
    if (
        not kept_ND.numel() or bool(torch.isfinite(kept_ND.sum())) or bool(torch.isfinite(kept_ND).all())
    ):  # the sum is one cheap pass, and may overflow
        return
    bad = int((~torch.isfinite(kept_ND).all(dim=1)).sum())
    overflow = bool(torch.isfinite(raw_ND.cpu()[source_N]).all())
    raise StageFailed(
        f"{bad} of {kept_ND.shape[0]} activation rows at {site} are NaN or infinite (language-model batch {batch})",
        where="extract",
        why=f"finite in the model, they overflow the stream's {dtype}" if overflow else "they come so from the model (or from the files, with native/files)",
        fix="set extract.dtype to bfloat16 or float32"
        if overflow
        else "set model.dtype to bfloat16 or float32, and check the model's weights (with native/files: the files)",
    )


def _hash(acts: dict[str, Tensor], extras: Sequence[Tensor | None]) -> str:
    digest = hashlib.sha256()
    columns = [column for column in extras if column is not None] or [
        acts[site].cpu().contiguous().view(torch.uint8) for site in sorted(acts)
    ]
    for column in columns:
        digest.update(memoryview(column.numpy().reshape(-1)).cast("B"))
    return digest.hexdigest()
