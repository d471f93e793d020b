"""A loaded Hugging Face model, packed tokens and sites in; activation rows, all sites from one truncated forward pass, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from saehub.activations import taps
from saehub.api import Rows
from saehub.errors import StageFailed, UsageError
from saehub.sites import Site
from saehub_native.extract_fused import fused
from saehub_native.kernels.team import Team

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset
    from saehub_native.extract_config import HFConfig


TOKENS_A_PIECE = 1024
"""At most, of one core's forward pass, unless one sequence has more: what its layers write stays in the caches, in memory that is used again."""
AGREE = 2.0**-4
"""Relative, Frobenius: of a site's rows, where both models round to bfloat16 in every layer."""
MOST_THREADS = 8
"""So many forward passes at a time: with more, they would wait for the interpreter. There one pass uses all cores."""


class HFExtractor:
    """`native/hf`: the reference extractor, hooks on the unprocessed model."""

    def __init__(self, config: HFConfig | None = None):
        self.config = config

    def open(self, model: ModelHandle | None, tokens: TokenDataset | None, sites: Sequence[str], *, lm_batch: int) -> HFSession:
        """Check sites, widths and the context against the model, and start reading. UsageError names what the model lacks."""
        if model is None or tokens is None:
            raise UsageError(
                "native/hf needs a model and text",
                where="extract.uses",
                fix='set model.name and data.train, or use native/files; an evaluator that reads rows is registered with needs=("model", "tokens")',
            )
        if tokens.context > model.shape.context:
            raise UsageError(
                f"sequences of {tokens.context} tokens are longer than {model.spec.name} allows",
                why=f"it accepts {model.shape.context} positions",
                where="data.train.context",
                fix=f"use at most {model.shape.context}",
            )
        return HFSession(model, tokens, sites, lm_batch)


class HFSession:
    """Batch `b` is always the same sequences in the same pieces, so its rows depend on `b` alone (to the last bit, at one number of threads)."""

    concurrent = True
    """`rows` may run in another thread while this one uses the model: taps act in their own thread only."""

    def __init__(self, model: ModelHandle, tokens: TokenDataset, sites: Sequence[str], lm_batch: int):
        self.model, self.tokens, self.lm_batch = model, tokens, lm_batch
        self.taps = {str(site): Site.parse(site).tap(model.shape) for site in sites}
        if not self.taps:
            raise UsageError("no site to extract", where="extract.sites", fix="write sites: [resid_post.2]")
        self._team, self._hf = Team(), model.hf
        self.n_batches = tokens.n_batches(lm_batch)
        self.calibration_batches = tokens.calibration_batches(lm_batch)
        self.data_hash = tokens.hash
        first_BT = tokens.tokens(0, 1)[:, :2]
        first = self._read(first_BT)
        self.widths = {site: x_BTD.shape[-1] for site, x_BTD in first.items()}
        self._hf = self._faster(first_BT, first)

    def _faster(self, tokens_BT: torch.Tensor, wanted: dict[str, torch.Tensor]) -> nn.Module:
        """The model with compiled modules where they give the same rows, to rounding; else the model."""
        twin = fused(self.model.hf)
        if twin is None:
            return self.model.hf
        try:
            found = taps.read(twin, tokens_BT, self.taps)
        except StageFailed:  # a model that calls its modules by other ways than its tree
            return self.model.hf
        same = all((found[site].float() - x_BTD.float()).norm() <= AGREE * x_BTD.float().norm() for site, x_BTD in wanted.items())
        return twin if same else self.model.hf

    def _read(self, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        top = int(tokens_BT.max())
        if top >= self.model.shape.vocab:
            raise StageFailed(
                f"token id {top} is outside the model's vocabulary of {self.model.shape.vocab}",
                why="the tokens were made with another tokenizer",
                fix="use the tokenizer that belongs to the model",
            )
        found = taps.read(self._hf, tokens_BT, self.taps, split=self._split(*tokens_BT.shape), run=self._team.run)
        for site, x_BTD in found.items():
            if x_BTD.ndim != 3 or x_BTD.shape[:2] != tokens_BT.shape:
                raise StageFailed(
                    f"site {site!r} does not hold one row a token",
                    why=f"{list(tokens_BT.shape)} tokens give a tensor of shape {list(x_BTD.shape)}",
                    fix="choose a module whose input or output is [batch, positions, width]",
                )
        return found

    def _split(self, sequences: int, context: int) -> int | None:
        """Sequences a forward pass: on a CPU with few threads each thread runs its own, on a few sequences at a time."""
        threads = torch.get_num_threads()
        if next(self.model.hf.parameters()).device.type != "cpu" or threads > MOST_THREADS:
            return None
        turns = -(-sequences * context // (threads * TOKENS_A_PIECE))
        return -(-sequences // (threads * turns))

    def rows(self, batch: int) -> Rows:
        """All sites' rows of one language-model batch, on the model's device and in its dtype, each token's from one forward pass."""
        i, j = self.tokens.batch_range(batch, self.lm_batch)
        tokens_BT = self.tokens.tokens(i, j)
        acts = {site: x_BTD.reshape(-1, x_BTD.shape[-1]) for site, x_BTD in self._read(tokens_BT).items()}
        sequences, context = tokens_BT.shape
        return Rows(
            acts=acts,
            keep_N=self.tokens.keep(i, j).reshape(-1),
            token_ids_N=tokens_BT.reshape(-1),
            positions_N=torch.arange(context).repeat(sequences),
            sequences_N=torch.arange(i, j).repeat_interleave(context),
        )

    def kept(self, batch: int) -> int:
        """Rows of that batch that are not excluded; read from the index, no model."""
        return self.tokens.kept(*self.tokens.batch_range(batch, self.lm_batch))

    def close(self) -> None:
        """Nothing is held between batches: hooks live only inside a forward pass."""
