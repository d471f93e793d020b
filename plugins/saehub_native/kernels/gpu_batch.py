"""Rows, weights and k in; the k·B largest pre-activations of the whole batch out, by histograms instead of sorting B·F numbers (BatchTopK)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saehub_native.kernels.gpu_common import GROUP, GUARD, SCORE_BYTES

PASSES = ((21, 1024), (11, 1024), (0, 2048))
"""Shift and bins of the three looks at the 31 bits of a non-negative float."""
BATCH_BYTES = 8 * SCORE_BYTES  # scores of a whole batch; wider ones are selected in plain torch
TRIES = 4


class BatchChoice:
    """The part of `GpuKernels` for `encode_select_batch`.

    T, the k·B-th largest group maximum of all scores, is at most the k·B-th largest score. Latents with a score of at least T − GUARD ρ |x_b| are
    computed in float32, ρ being the root mean square of (value − score)/|x_b|; the k·B-th largest exact value is the cut. The selection holds where
    the cut lies above each row's bar by GUARD ρ |x_b|, with the ρ of this batch; otherwise the bars are lowered, and after that plain torch decides.
    """

    on_batch: Any
    encoding: Any
    _error = 2.0**-9
    """A guess of ρ for the next batch: it changes the work, not the result."""

    def nth_largest(self, values: Tensor, wanted: int) -> Tensor:
        """The `wanted`-th largest of non-negative float32 numbers, 0-dimensional; 0 where fewer are positive. Exact, in three passes."""
        values_N, device = values.view(-1), values.device
        n, block, passes = values_N.numel(), 1024, 8
        prefix, left = torch.zeros((), device=device, dtype=torch.int32), torch.full((), wanted, device=device, dtype=torch.int64)
        lacking = torch.zeros((), device=device, dtype=torch.bool)
        for i, (shift, bins) in enumerate(PASSES):
            counts_V = torch.zeros(bins, device=device, dtype=torch.int32)
            self.on_batch.histogram[(-(-n // (block * passes)),)](
                values_N, n, prefix, counts_V, SHIFT=shift, BINS=bins, FIRST=i == 0, BLOCK=block, PASSES=passes
            )
            down_V = counts_V.flip(0).cumsum(0)  # how many lie in the upper bins
            higher = (down_V < left).sum()
            lacking |= higher == bins
            bin_ = (bins - 1 - higher).clamp_min(0)
            left = left - torch.where(higher > 0, down_V[(higher - 1).clamp(0, bins - 1).unsqueeze(0)].squeeze(0), 0)
            prefix = (prefix * bins + bin_).int()
        return torch.where(lacking, 0, prefix).view(torch.float32)

    def encode_select_batch(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n_rows, n_latents, low_FD = x_BD.shape[0], W_enc_FD.shape[0], self.low(W_enc_FD)
        dtype = torch.float32 if self.interpreted else low_FD.dtype
        if not self.ranks(n_latents, k + self.r) or n_rows * n_latents * dtype.itemsize > BATCH_BYTES:
            return super().encode_select_batch(x_BD, W_enc_FD, b_enc_F, k)
        x_BD = x_BD.contiguous()
        n_groups, norms_B = -(-n_latents // GROUP), x_BD.norm(dim=1)
        scores_BF = torch.empty(n_rows, n_latents, device=x_BD.device, dtype=dtype)
        maxima_BG = torch.empty(n_rows, n_groups, device=x_BD.device)
        chunk = max(64, SCORE_BYTES // (dtype.itemsize * n_latents))
        for at in range(0, n_rows, chunk):
            here = slice(at, at + chunk)
            self.scores(x_BD[here], W_enc_FD, b_enc_F, False, out=(scores_BF[here], maxima_BG[here]))
        found = self._batch(x_BD, W_enc_FD, b_enc_F, k, scores_BF, maxima_BG, norms_B)
        if found is None:
            del scores_BF, maxima_BG
            return super().encode_select_batch(x_BD, W_enc_FD, b_enc_F, k)
        values_BK, indices_BK, cut = found
        if self.audit_due():
            self._audit(x_BD, W_enc_FD, b_enc_F, values_BK, indices_BK, k, "batch", cut)
        self.selections += 1
        return values_BK, indices_BK

    def _batch(
        self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, k: int, scores_BF: Tensor, maxima_BG: Tensor, norms_B: Tensor
    ) -> tuple[Tensor, Tensor, float] | None:
        """Values, indices and the cut; None where the scores cannot prove it."""
        n_rows, n_latents = scores_BF.shape
        bar, counts_B = self.nth_largest(maxima_BG, k * n_rows), torch.empty(n_rows, device=x_BD.device, dtype=torch.int32)
        nothing = torch.empty(1, device=x_BD.device, dtype=torch.int32)
        for _ in range(TRIES):
            bar_B = (bar - GUARD * self._error * norms_B).clamp_min(0).contiguous()
            self.encoding.gather[(n_rows,)](
                scores_BF, maxima_BG, bar_B, nothing, counts_B, n_latents, 0, GROUP=GROUP, GROUPS=64
            )  # counts alone
            capacity = int(counts_B.max())
            if capacity == 0 or capacity * n_rows * 16 > 4 * SCORE_BYTES:
                return None
            exact_BC, score_BC, indices_BC, counts_B, _ = self.candidates(x_BD, W_FD, b_F, 0, scores_BF, maxima_BG, bar_B, capacity)
            here_BC = torch.arange(capacity, device=x_BD.device) < counts_B.unsqueeze(1)
            values_BC = torch.where(here_BC, exact_BC.relu(), 0.0)
            cut = self.nth_largest(values_BC, k * n_rows)
            misses_BC = torch.where(here_BC, values_BC - score_BC, 0.0) / norms_B.clamp_min(1e-30).unsqueeze(1)
            rms = (misses_BC.square().sum() / counts_B.sum().clamp_min(1)).sqrt()
            holds = (cut - bar_B >= GUARD * rms * norms_B).all() & (cut > 0)
            chosen_BC = (values_BC >= cut) & (values_BC > 0)
            holds, rms, cut, fullest = torch.stack([holds.float(), rms, cut, chosen_BC.sum(1).max().float()]).tolist()  # one wait
            if holds:
                self._error = 1.25 * rms + 1e-12
                order = torch.where(chosen_BC, values_BC, 0.0).sort(dim=1, descending=True, stable=True)
                kept = max(1, int(fullest))
                places_BK, values_BK = order.indices[:, :kept], order.values[:, :kept].contiguous()
                rows_B1, columns_K = torch.arange(n_rows, device=x_BD.device).unsqueeze(1), torch.arange(kept, device=x_BD.device)
                spare_BK = (rows_B1 + n_rows * columns_K) % n_latents  # spread, so that no latent has very many pairs of value 0
                return values_BK, torch.where(values_BK > 0, indices_BC.gather(1, places_BK), spare_BK), cut
            if not rms < float("inf"):
                return None
            self._error = max(2 * self._error, 1.5 * rms)
        return None
