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

CPU_CHUNK, GPU_CHUNK = 2**20, 2**26
"""Logits are compared this many elements at a time: 4 MiB stay in a CPU's cache, a GPU wants few and large steps."""


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
    """Sequences whose clean logits and probabilities (float32) and logits under one intervention fit `memory` bytes; at least 1."""
    return max(1, memory // (context * vocab * (8 + itemsize)))


class LossPiece:
    """A few sequences with the clean model's predictions, computed once and shared by every intervention on them."""

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
        self.positions_M = torch.nn.functional.pad(counted_BT, (0, 1)).flatten().nonzero()[:, 0]
        """Index of each counted position in the flattened [b · T]."""
        self.targets_M = self.tokens_BT[:, 1:][counted_BT]
        self.units_M = np.repeat(units_B, counted_BT.sum(1).cpu().numpy())
        """Sequence of each counted position."""
        self.logits_MV = clean_BTV.flatten(0, 1)[self.positions_M].float()
        self.norm_M = self.logits_MV.logsumexp(-1)
        self.p_MV = (self.logits_MV - self.norm_M[:, None]).exp_()
        self.clean_ce_M = _numpy(self.norm_M - _at(self.logits_MV, self.targets_M))
        """Cross-entropy of the clean model, nats, float64 [m]."""

    def under(self, tap: Tap, replacement_ND: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(CE, KL(clean ‖ replaced)) at the counted positions, nats, float64 [m], with the kept rows at `tap` replaced.

            CE_t = -log q_t(next token)        KL_t = Σ_v p_t(v) (log p_t(v) - log q_t(v))

        with log q = z - Z, Z = logsumexp z, and log p = z' - Z': KL = Σ_v p (z' - z) - Z' + Z, which is exactly 0 where nothing changed.
        `replacement_ND`: [kept rows, d], or [d] for the same vector everywhere.
        """

        def replace(x_BTD: Tensor) -> Tensor:
            new_BTD = x_BTD.clone()
            new_BTD[self.keep_BT] = replacement_ND.to(x_BTD).expand(int(self.keep_BT.sum()), -1)
            return new_BTD

        new_NV = taps.splice(self.hf, self.tokens_BT, tap, replace).flatten(0, 1)
        ce, kl = np.zeros(len(self.targets_M)), np.zeros(len(self.targets_M))
        step = max(1, (CPU_CHUNK if new_NV.device.type == "cpu" else GPU_CHUNK) // new_NV.shape[-1])
        for at in range(0, len(ce), step):
            part = slice(at, at + step)
            z_MV = new_NV[self.positions_M[part]].float()
            norm_M = z_MV.logsumexp(-1)
            ce[part] = _numpy(norm_M - _at(z_MV, self.targets_M[part]))
            dot_M = torch.linalg.vecdot(self.p_MV[part], z_MV.neg_().add_(self.logits_MV[part]))
            kl[part] = _numpy(dot_M - self.norm_M[part] + norm_M)
        return ce, kl


def _at(values_MV: Tensor, targets_M: Tensor) -> Tensor:
    """[m]: each row's value at its target."""
    return values_MV.gather(1, targets_M[:, None])[:, 0]


def _numpy(values_M: Tensor) -> np.ndarray:
    return values_M.cpu().double().numpy()
