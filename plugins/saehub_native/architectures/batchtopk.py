"""BatchTopK: rows and parameters in; the k·B largest pre-activations of a batch out, and at the end the threshold that replaces the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saehub_native.architectures.sparse import Sparse


class BatchTopK(Sparse):
    """In training f_bi = max(p_bi, 0) if p_bi is among the k·B largest of the batch's B rows, else 0; at inference f_i = max(p_i, 0)·[p_i > θ]
    (Bussmann et al. 2024, arXiv 2412.06410).

    θ is calibrated once, at the end, on N calibration rows, which are not training rows: the middle between the k·N-th and the next largest of
    their pre-activations, so that exactly k·N of them pass. (A running average of batch minima that starts at 0 needs thousands of steps.)
    """

    static = False

    def select(self, params: Mapping[str, Tensor], centred_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.kernels.encode_select_batch(centred_BD, params["W_enc"], params["b_enc"], k)

    def threshold(self, params: Mapping[str, Tensor], x_ND: Tensor) -> float:
        """θ; 0 where fewer than k·N pre-activations are positive."""
        k, n_latents = self.config.k, params["b_enc"].shape[0]
        centred_ND = self.centred(params, x_ND)
        fullest = self.select(params, centred_ND, k)[0].shape[1]
        # A row has at most `fullest` chosen pairs, so the best one left out is among each row's fullest + 1.
        values_NK, _ = self.kernels.encode_select(centred_ND, params["W_enc"], params["b_enc"], min(n_latents, fullest + 1))
        wanted = k * x_ND.shape[0]
        best = torch.topk(values_NK.flatten(), min(wanted + 1, values_NK.numel())).values
        return 0.0 if wanted >= best.numel() else float(best[wanted - 1 : wanted + 1].double().mean())

    def export(self, params: Mapping[str, Tensor], x_ND: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = super().export(params)
        return fields, tensors | {"threshold": torch.tensor(self.threshold(params, x_ND), dtype=torch.float32)}
