"""A model, tokens and replaced activations in; next-token cross-entropy and KL to the clean model at each counted position out.

Counted are the positions t whose own token and next token are both kept rows, the next token not being BOS: the predictions that the
SAE touches and that text was there to judge. Interventions replace kept rows alone; excluded positions (BOS, padding) keep their original
activation, under ablation too, so that a reconstruction of zeros equals zero-ablation and the identity equals the clean model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saehub.activations import taps

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle
    from saehub.sites import Tap

CHUNK_ELEMENTS = 2**24
"""Log-probabilities under an intervention are made for this many elements at a time (64 MiB)."""


def not_measurable(model: ModelHandle | None, has_tokens: bool) -> str | None:
    """Why cross-entropy cannot be measured; None when it can."""
    if model is None:
        return "no language model was loaded: the activations came from files"
    if not has_tokens:
        return "the dataset has no token ids"
    kind = type(model.hf).__name__
    if "MaskedLM" in kind or "PreTraining" in kind:
        return f"{kind} does not predict the next token"
    if model.hf.get_output_embeddings() is None:
        return f"{kind} has no language-modelling head"
    return None


def sequences_at_once(memory: int, context: int, vocab: int, itemsize: int) -> int:
    """Sequences whose clean log-probabilities (float32) and logits under one intervention fit `memory` bytes; at least 1."""
    return max(1, memory // (context * vocab * (4 + 2 * itemsize)))


class LossPiece:
    """A few sequences with the clean model's log-probabilities, computed once and shared by every intervention on them."""

    def __init__(self, model: ModelHandle, tokens_BT: Tensor, keep_BT: Tensor, units_B: np.ndarray, limit: int | None = None):
        """tokens int64 [b, T], kept rows bool [b, T], sequence indices int64 [b]; positions of sequences from `limit` on are not counted."""
        self.hf = model.hf
        clean_BTV = taps.logits(self.hf, tokens_BT)
        device = clean_BTV.device
        self.tokens_BT, self.keep_BT = tokens_BT.to(device), keep_BT.to(device)
        counted_BT = self.keep_BT[:, :-1] & self.keep_BT[:, 1:]
        bos = getattr(model.tokenizer, "bos_token_id", None)
        if bos is not None:
            counted_BT = counted_BT & (self.tokens_BT[:, 1:] != bos)
        if limit is not None:
            counted_BT = counted_BT & torch.from_numpy(units_B < limit).to(device)[:, None]
        self.counted_BT = counted_BT
        self.targets_M = self.tokens_BT[:, 1:][counted_BT]
        self.units_M = np.repeat(units_B, counted_BT.sum(1).cpu().numpy())
        """Sequence of each counted position."""
        self.clean_MV = clean_BTV[:, :-1][counted_BT].float().log_softmax(-1)
        self.clean_ce_M = self._ce(self.clean_MV, self.targets_M)
        """Cross-entropy of the clean model, nats, float64 [m]."""

    @staticmethod
    def _ce(logp_MV: Tensor, targets_M: Tensor) -> np.ndarray:
        return -logp_MV.gather(1, targets_M[:, None])[:, 0].cpu().double().numpy()

    def under(self, tap: Tap, replacement_ND: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(CE, KL(clean ‖ replaced)) at the counted positions, nats, float64 [m], with the kept rows at `tap` replaced.

            CE_t = -log q_t(next token)        KL_t = Σ_v p_t(v) (log p_t(v) - log q_t(v))

        `replacement_ND`: [kept rows, d], or [d] for the same vector everywhere.
        """

        def replace(x_BTD: Tensor) -> Tensor:
            new_BTD = x_BTD.clone()
            new_BTD[self.keep_BT] = replacement_ND.to(x_BTD).expand(int(self.keep_BT.sum()), -1)
            return new_BTD

        logits_MV = taps.splice(self.hf, self.tokens_BT, tap, replace)[:, :-1][self.counted_BT]
        ce, kl = np.zeros(len(self.targets_M)), np.zeros(len(self.targets_M))
        step = max(1, CHUNK_ELEMENTS // logits_MV.shape[-1])
        for at in range(0, len(self.targets_M), step):
            part = slice(at, at + step)
            logq_MV = logits_MV[part].float().log_softmax(-1)
            logp_MV = self.clean_MV[part]
            ce[part] = self._ce(logq_MV, self.targets_M[part])
            kl[part] = (logp_MV.exp() * (logp_MV - logq_MV)).sum(-1).cpu().double().numpy()
        return ce, kl
