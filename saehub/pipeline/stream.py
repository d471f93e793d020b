"""A run's context and the sites wanted in; the blocks, calibration rows, scales and probe rows that its trainers get, spooled or stored as planned, out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saehub.api import Rows
from saehub.errors import Interrupted
from saehub.pipeline import keys
from saehub.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.activations.blocks import Block
    from saehub.pipeline.context import Context


@dataclass(frozen=True)
class ProbeRows:
    """Rows for a golden probe, none of them training rows."""

    acts: dict[str, Tensor]
    token_ids_N: Tensor | None
    positions_N: Tensor | None
    contexts_NT: Tensor | None
    """int64 [n, context]: the whole sequence of each row."""


class _Stoppable:
    """An extractor session that gives way to Ctrl-C between two forward passes."""

    def __init__(self, session: Any, stop: Any):
        self._session, self._stop = session, stop
        self._abandoned = False

    def abandon(self) -> None:
        """Nobody waits for rows any more."""
        self._abandoned = True

    def rows(self, batch: int) -> Any:
        if self._stop.is_set() or self._abandoned:
            raise Interrupted("stopped; every job's state is saved", fix="the same command goes on from here")
        return self._session.rows(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class HubStream:
    """The one stream that all jobs of a pass read; a context manager."""

    def __init__(self, context: Context, sites: list[str], seed: int):
        from saehub.activations.blocks import BlockStream

        plan, extract = context.plan, context.plan.recipe.extract
        self.context, self.sites = context, sites
        self.identity = self._identity(plan)
        tokens = context.tokens("train") if plan.of("tokens") else None
        self.session = _Stoppable(context.open_extractor(tokens, sites), context.stop)
        self.calibration_batches = (
            tokens.calibration_batches(extract.lm_batch) if tokens is not None else _batches_for(self.session, extract.calibration)
        )
        self.blocks = BlockStream(
            self.session,
            sites=sites,
            seed=seed,
            batches_per_block=plan.totals["batches_per_block"],
            dtype=extract.dtype,
            rows=plan.totals["rows"],
            calibration_batches=self.calibration_batches,
            repeat=plan.totals["repeat"],
        )
        self.n_blocks = self.blocks.n_blocks
        self._calibration: dict[str, Tensor] | None = None
        self._scaled: dict[tuple[str, str], Tensor] = {}
        self._store = self._open_store(plan)
        self._ahead = None
        if getattr(self.session, "concurrent", False) is True:  # the extractor may work while the trainers do
            import torch

            from saehub.activations.ahead import Ahead

            # A new thread takes the number of threads that it finds set, which kernels may have lowered for a moment.
            threads = torch.get_num_threads()
            self._ahead = Ahead(self._block, self.n_blocks, begin=lambda: torch.set_num_threads(threads))

    @staticmethod
    def _identity(plan: Any) -> dict[str, Any]:
        return plan.totals["stream"]

    def __enter__(self) -> HubStream:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ahead is not None:
            self.session.abandon()
            self._ahead.close()
        self.session.close()

    # Blocks

    def _open_store(self, plan: Any) -> Any:
        if plan.totals["store"] == "none":
            return None
        from saehub.activations.shards import ShardStore

        key = keys.stage_key("activations", stream=self.identity, sites=self.sites)
        return ShardStore(plan.store.path("activations", key))

    def block(self, index: int) -> Block:
        """Block `index`: from disk if it is there, else extracted (and written); the next one is begun where the extractor allows it."""
        return self._block(index) if self._ahead is None else self._ahead.take(index)

    def _block(self, index: int) -> Block:
        if self._store is None:
            return self.blocks.block(index)
        if self._store.complete(index):
            return self._store.read(index)
        block = self.blocks.block(index)
        self._store.write(index, block)
        return block

    def used(self, index: int) -> None:
        """Every job has consumed block `index`: a spool lets it go, a store keeps it."""
        if self._store is not None and self.context.plan.totals["store"] == "spool":
            self._store.delete(index)

    def block_of(self, row: int) -> int:
        """The block that holds stream row `row` (`n_blocks` when it is past the end)."""
        return next((b for b in range(self.n_blocks) if row < self.blocks.first_row(b + 1)), self.n_blocks)

    # Calibration rows

    def calibration(self, n: int) -> dict[str, Tensor]:
        """The first `n` calibration rows of every site, kept in the store so that a resumed run need not extract them again."""
        if self._calibration is None:
            self._calibration = {site: self._calibration_site(site) for site in self.sites}
        return {site: rows[:n] for site, rows in self._calibration.items()}

    def scaled_calibration(self, site: str, normalize: str) -> Tensor:
        """All calibration rows of `site`, float32 and normalised; one copy for all jobs."""
        if (site, normalize) not in self._scaled:
            n = self.context.plan.recipe.extract.calibration
            self._scaled[site, normalize] = self.calibration(n)[site].float() * self.scale(site, normalize)
        return self._scaled[site, normalize]

    def _calibration_site(self, site: str) -> Tensor:
        from safetensors.torch import load_file, save_file

        store = self.context.plan.store
        key = keys.stage_key("calibration", stream=self.identity, site=site)
        if not store.complete("calibration", key):
            rows = self.blocks.calibration(self.context.plan.recipe.extract.calibration)
            for name in self.sites:
                own = keys.stage_key("calibration", stream=self.identity, site=name)
                with store.lock(own):
                    if not store.complete("calibration", own):
                        with store.create("calibration", own, {"schema": 1, "site": name}) as folder:
                            save_file({"rows": rows[name].contiguous()}, folder / "calibration.safetensors")
        return load_file(store.path("calibration", key) / "calibration.safetensors")["rows"]

    def scale(self, site: str, normalize: str) -> float:
        """The factor that brings the calibration rows of `site` to the wanted norm: sqrt(d) / E|x|, 1 / E|x|, or 1."""
        from saehub.activations.blocks import scale_of

        return 1.0 if normalize == "none" else scale_of(self.calibration(self.context.plan.recipe.extract.calibration)[site], normalize)

    def hash_of(self, sites: list[str]) -> str:
        """The stream hash of one job."""
        return self.blocks.hash_of(sites)

    def probe_rows(self, n: int) -> ProbeRows:
        """Up to `n` rows of the first calibration batch (else of the first batch), spread over sequences and positions; the same for all."""
        import torch

        from saehub.checkpoint.probe import MIN_ROWS

        rows, batch = self.session.rows(0), 1
        while int(rows.keep_N.sum()) < MIN_ROWS and batch < self.session.n_batches:  # short batches: files, or few sequences at a time
            rows = _joined(rows, self.session.rows(batch))
            batch += 1
        kept = torch.nonzero(rows.keep_N).flatten()
        chosen = kept[torch.randperm(kept.numel(), generator=generator("probe"))[:n]].sort().values
        contexts = None
        if rows.token_ids_N is not None and rows.sequences_N is not None:
            first = int(rows.sequences_N[0])
            width = rows.token_ids_N.shape[0] // (int(rows.sequences_N[-1]) - first + 1)
            contexts = rows.token_ids_N.reshape(-1, width)[(rows.sequences_N[chosen] - first)]
        acts = {site: x_ND[chosen].float() for site, x_ND in rows.acts.items()}
        if contexts is None or rows.positions_N is None:  # activations from files: a probe has all of this, or none
            return ProbeRows(acts, None, None, None)
        return ProbeRows(acts, rows.token_ids_N[chosen], rows.positions_N[chosen], contexts)


def _joined(first: Rows, second: Rows) -> Rows:
    """The rows of two batches as one."""
    import torch

    columns = ("token_ids_N", "positions_N", "sequences_N")
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in columns}
    return Rows(
        {site: torch.cat([x, second.acts[site]]) for site, x in first.acts.items()},
        torch.cat([first.keep_N, second.keep_N]),
        **{name: None if left is None or right is None else torch.cat([left, right]) for name, (left, right) in pairs.items()},
    )


def _batches_for(session: Any, rows: int) -> int:
    """How many leading batches hold `rows` kept rows."""
    count = batch = 0
    while count < rows and batch < session.n_batches:
        count += session.kept(batch)
        batch += 1
    return batch
