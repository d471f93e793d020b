"""A loaded Hugging Face model, packed tokens and sites in; activation rows read by nnsight, the tracer that dictionary_learning's own buffer uses, out.

Not through that buffer: it shuffles rows, forgets which token each came from, drops column 0 as BOS whatever stands there, and ends with an
AttributeError when text runs out (`buffer.py`), so batch `b` could not be a function of `b`. The trace is the same; the tokens are the hub's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from saehub.api import Rows
from saehub.errors import StageFailed, UsageError
from saehub.sites import Site
from saehub_dictionary_learning.tracing import Traced

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset

ADDRESS = "dictionary_learning/nnsight"


class NNsightExtractor:
    """`dictionary_learning/nnsight`: one trace of the whole model a batch, all sites from it."""

    def __init__(self, config: None = None):
        pass

    def open(self, model: ModelHandle | None, tokens: TokenDataset | None, sites: Sequence[str], *, lm_batch: int) -> NNsightSession:
        """Check sites, widths and the context against the model, and start reading. UsageError names what the model lacks."""
        if model is None or tokens is None:
            raise UsageError(f"{ADDRESS} needs a model and text", where="extract.uses", fix="set model.name and data.train, or use native/files")
        if tokens.context > model.shape.context:
            raise UsageError(
                f"sequences of {tokens.context} tokens are longer than the {model.shape.context} that {model.spec.name} accepts",
                where="data.train.context",
                fix=f"use at most {model.shape.context}",
            )
        if not sites:
            raise UsageError("no site to extract", where="extract.sites", fix="write sites: [resid_post.2]")
        return NNsightSession(model, tokens, sites, lm_batch)


class NNsightSession:
    """Batch `b` is always the same sequences in the same trace. nnsight's hooks are on the model only while a batch is read."""

    def __init__(self, model: ModelHandle, tokens: TokenDataset, sites: Sequence[str], lm_batch: int):
        self.model, self.tokens, self.lm_batch = model, tokens, lm_batch
        self.sites = {str(site): str(site) for site in sites}
        for site in self.sites:
            Site.parse(site).tap(model.shape)
        self.n_batches = tokens.n_batches(lm_batch)
        self.widths = {site: x_BTD.shape[-1] for site, x_BTD in self._read(tokens.tokens(0, 1)[:, :2]).items()}

    def _read(self, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        if int(tokens_BT.max()) >= self.model.shape.vocab:
            raise StageFailed(
                f"token id {int(tokens_BT.max())} is outside the model's vocabulary of {self.model.shape.vocab}",
                why="the tokens were made with another tokenizer",
                fix="use the tokenizer that belongs to the model",
            )
        with Traced(self.model) as traced:
            found = traced.read(tokens_BT, self.sites)
        for site, x_BTD in found.items():
            if x_BTD.ndim != 3 or x_BTD.shape[:2] != tokens_BT.shape:
                raise StageFailed(
                    f"site {site!r} does not hold one row a token",
                    why=f"{list(tokens_BT.shape)} tokens give a tensor of shape {list(x_BTD.shape)}",
                    fix="choose a module whose input or output is [batch, positions, width]",
                )
        return found

    def rows(self, batch: int) -> Rows:
        """All sites' rows of one language-model batch, in the model's dtype, from one trace."""
        i, j = self.tokens.batch_range(batch, self.lm_batch)
        tokens_BT = self.tokens.tokens(i, j)
        sequences, context = tokens_BT.shape
        return Rows(
            acts={site: x_BTD.reshape(-1, x_BTD.shape[-1]) for site, x_BTD in self._read(tokens_BT).items()},
            keep_N=self.tokens.keep(i, j).reshape(-1),
            token_ids_N=tokens_BT.reshape(-1),
            positions_N=torch.arange(context).repeat(sequences),
            sequences_N=torch.arange(i, j).repeat_interleave(context),
        )

    def kept(self, batch: int) -> int:
        """Rows of that batch that are not excluded; read from the index, no model."""
        return self.tokens.kept(*self.tokens.batch_range(batch, self.lm_batch))

    def close(self) -> None:
        """Nothing is held between batches."""
