"""The kernels in plain float32 torch, on any device: one chunked GEMM with top-k, embedding bags for everything sparse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saehub_native.kernels import Firing, Rule

CHUNK_BYTES = 8 << 20  # pre-activations of one chunk: stays near the cache, and no [B, F] tensor exists for wide dictionaries


GROUP = 8  # latents a group in `select_top`: of 4, 8, 16 and 32 the fastest on a CPU, about twice torch.topk


def select_top(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and their positions, in no particular order, exact.

    In two stages: every one of the k largest entries lies in one of the k groups with the largest maxima (else k other groups would each
    hold something larger), so only the entries of those groups are compared one by one.
    """
    n_latents = pre_BF.shape[1]
    n_groups = n_latents // GROUP
    if n_latents % GROUP or n_groups < 2 * k:
        return torch.topk(pre_BF, k, dim=1, sorted=False)
    maxima_BG = pre_BF.view(-1, GROUP, n_groups).amax(1)  # group g = {g, g + n_groups, …}: strided, so that the maximum vectorises
    groups_BK = torch.topk(maxima_BG, k, dim=1, sorted=False).indices
    members_1G1 = torch.arange(0, n_latents, n_groups, device=pre_BF.device).view(1, GROUP, 1)
    candidates_BC = (groups_BK.unsqueeze(1) + members_1G1).flatten(1)
    top = torch.topk(pre_BF.gather(1, candidates_BC), k, dim=1, sorted=False)
    return top.values, candidates_BC.gather(1, top.indices)


def select_abs(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of each row with the largest absolute values, signs kept, and their positions, in no particular order."""
    indices_BK = select_top(pre_BF.abs(), k)[1]
    return pre_BF.gather(1, indices_BK), indices_BK


def select_group(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest entry of each of k contiguous groups, and its position."""
    size = pre_BF.shape[1] // k
    values_BK, within_BK = pre_BF.unflatten(1, (k, size)).max(dim=-1)
    return values_BK, within_BK + torch.arange(0, k * size, size, device=pre_BF.device)


SELECT = {"top": select_top, "abs": select_abs, "group": select_group}


class ReferenceKernels:
    """Implements `saehub_native.kernels.Kernels`; keeps its scratch tensors, because fresh ones cost page faults every step."""

    name = "reference"
    lazy = False

    def __init__(self) -> None:
        self._scratch: Tensor | None = None
        self.fullest = 0  # a guess for the next batch of `encode_select_batch`: it changes the work, not the result

    def _pre_acts(self, rows: int, n_latents: int, like: Tensor) -> Tensor:
        held = self._scratch
        if held is None or held.shape != (rows, n_latents) or held.device != like.device or held.dtype != like.dtype:
            self._scratch = held = torch.empty(rows, n_latents, device=like.device, dtype=like.dtype)
        return held

    def encode_select(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: Rule = "top") -> tuple[Tensor, Tensor]:
        n_rows, n_latents = x_BD.shape[0], W_enc_FD.shape[0]
        values_BK = torch.empty(n_rows, k, device=x_BD.device, dtype=x_BD.dtype)
        indices_BK = torch.empty(n_rows, k, device=x_BD.device, dtype=torch.int64)
        # The chunk depends on the shapes alone: the same rows always meet in the same GEMM.
        chunk = min(n_rows, max(64, CHUNK_BYTES // (4 * n_latents)))
        scratch = self._pre_acts(chunk, n_latents, x_BD)
        for start in range(0, n_rows, chunk):
            x_cD = x_BD[start : start + chunk]
            pre_cF = torch.addmm(b_enc_F, x_cD, W_enc_FD.t(), out=scratch[: x_cD.shape[0]])
            stop = start + x_cD.shape[0]
            values_BK[start:stop], indices_BK[start:stop] = SELECT[rule](pre_cF, k)
        return values_BK if rule == "abs" else values_BK.relu_(), indices_BK

    def encode_select_batch(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n_rows, n_latents = x_BD.shape[0], W_enc_FD.shape[0]
        width = min(n_latents, max(2 * k, self.fullest))
        while True:
            values_BK, indices_BK = self.encode_select(x_BD, W_enc_FD, b_enc_F, width)
            values_BK, order_BK = values_BK.sort(dim=1, descending=True)
            # Every chosen pair is among each row's `width` largest, unless a row fills all of them: then look further. What comes out does
            # not depend on the width that was tried first.
            cut = torch.kthvalue(values_BK.flatten(), n_rows * (width - k) + 1).values if width > k else values_BK.new_zeros(())
            chosen_BK = (values_BK >= cut) & (values_BK > 0)
            fullest = int(chosen_BK.sum(1).max())
            if fullest < width or width == n_latents:
                break
            width = min(n_latents, 2 * width)
        self.fullest = fullest + fullest // 4 + 1
        kept = max(1, fullest)
        return (values_BK * chosen_BK)[:, :kept].contiguous(), indices_BK.gather(1, order_BK[:, :kept])

    def decode(self, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        return F.embedding_bag(indices_BK, W_dec_FD, mode="sum", per_sample_weights=values_BK)

    def value_gradients(self, grad_BD: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        # embedding_bag's own gradient of per_sample_weights: a gathered dot product, without the [B, K, d] tensor of the plain formula.
        n_rows, k = indices_BK.shape
        starts_B = torch.arange(0, n_rows * k, k, device=grad_BD.device)
        rows_N = torch.arange(n_rows, device=grad_BD.device).repeat_interleave(k)
        dots_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad_BD, W_dec_FD, indices_BK.reshape(-1), starts_B, rows_N, 0, -1)
        return dots_N.view(n_rows, k)

    def reconstruct(
        self, target_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual_BD = target_BD.sub_(self.decode(values_BK, indices_BK, W_dec_FD))
        grad_BD = residual_BD * (-2 * weight)
        # A selected value of 0 is held there by the ReLU (or pads a row): no gradient.
        delta_BK = self.value_gradients(grad_BD, indices_BK, W_dec_FD).mul_(values_BK != 0)
        return residual_BD, grad_BD, delta_BK, residual_BD.square().sum()

    def group(self, indices_BK: Tensor, n_latents: int, values_BK: Tensor | None = None) -> Firing:
        latents_N = indices_BK.reshape(-1)
        order_N = torch.sort(latents_N.int(), stable=True).indices
        counts_F = torch.bincount(latents_N, minlength=n_latents)
        return Firing(order_N, order_N // indices_BK.shape[1], counts_F.cumsum(0) - counts_F, counts_F)

    def latent_sums(self, firing: Firing, weights_BK: Tensor, source_BD: Tensor) -> Tensor:
        weights_N = weights_BK.reshape(-1)[firing.order_N]
        return F.embedding_bag(firing.rows_N, source_BD, firing.offsets_F, mode="sum", per_sample_weights=weights_N)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def cautions(self) -> list[str]:
        return []

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None

    def expect_auxk(self, *arguments: Any, **settings: Any) -> None:
        pass

    def add_auxk(self, *arguments: Any, **settings: Any) -> Tensor | None:
        return None
