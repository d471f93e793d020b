"""A batch's residual and a mask of dead latents, both on the device, in; AuxK's loss and its gradients out, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saehub_native.kernels.gpu_common import SCORE_BYTES, listed
from saehub_native.kernels.lazy import RowSums

TILE, PLAIN_TILE = (128, 128, 32, 8, 3), (32, 64, 16, 4, 2)
"""Rows, columns and depth of a product's tile; warps; stages: on tensor cores, and without them."""
PROGRAMS = 64
"""Along the dead latents."""
LEAST_ROWS = 64
"""Of a chunk, however many latents there are."""


def best_precision() -> str:
    """TF32 where the device has it."""
    return "tf32" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 else "ieee"


class DeadLatents:
    """The part of `GpuKernels` for `architectures.auxk.add_auxk`: the same loss, as dense products over the dead latents in chunks of rows.

    On a device the products take TF32 operands (10 bits of mantissa) and float32 sums. Gradients of dead rows have a buffer for all latents
    being dead, kept between steps, of which only the rows in use are touched.
    """

    interpreted: bool
    lazy: bool
    on_dead: Any
    precision: str
    """Of the products' operands: `tf32`, or `ieee`, which is float32."""
    _held: dict[str, Tensor] | None = None

    def add_auxk(
        self,
        grads: dict[str, Tensor | RowSums],
        params: Mapping[str, Tensor],
        centred_BD: Tensor,
        residual_BD: Tensor,
        dead_F: Tensor,
        k_aux: int,
        alpha: float,
        signed: bool = False,
    ) -> Tensor | None:
        """α·L_aux, 0-dimensional; its gradients go to `grads` (RowSums of W_enc and W_dec, and b_enc). None where those are to be tensors."""
        if not self.lazy:
            return None
        W_enc_FD, b_enc_F, W_dec_FD = params["W_enc"], params["b_enc"], params["W_dec"]
        n_rows, (n_latents, d_in), d_out = len(residual_BD), W_enc_FD.shape, W_dec_FD.shape[1]
        list_F, count = listed(dead_F)
        slots_F = torch.where(dead_F, dead_F.int().cumsum(0, dtype=torch.int32) - 1, -1).int()
        spread = (residual_BD - residual_BD.mean(0)).square_().sum().clamp_min(torch.finfo(torch.float32).tiny)
        scale = 2 * alpha / spread
        chunk = min(n_rows, max(LEAST_ROWS, SCORE_BYTES // (4 * n_latents)))
        shapes = {
            "acts": (chunk, n_latents),
            "grad": (chunk, d_out),
            "enc": (n_latents, d_in),
            "dec": (n_latents, d_out),
            "b": (n_latents,),
            "unused": (n_latents,),
        }
        held = self._buffers(shapes, residual_BD)
        acts, grad, k = held["acts"], held["grad"], self.on_dead
        BM, BN, BK, warps, stages = (16, 32, 32, 4, 1) if self.interpreted else TILE if self.precision == "tf32" else PLAIN_TILE
        tile: dict[str, Any] = {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": stages, "PRECISION": self.precision}
        up = lambda n, size: -(-n // size)  # noqa: E731
        wide = min(up(n_latents, BN), PROGRAMS)  # programs along the dead latents, however many there are
        errors = []
        for at in range(0, n_rows, chunk):
            x_cD, e_cD = centred_BD[at : at + chunk].contiguous(), residual_BD[at : at + chunk].contiguous()
            n, first = len(x_cD), at == 0
            k.scores[(up(n, BM), wide)](
                x_cD, W_enc_FD, b_enc_F, list_F, count, acts, n, n_latents, d_in, MODE=k.SIGNED if signed else k.RELU, **tile
            )
            k.keep[(n,)](acts, count, n_latents, k_aux, BLOCK=1024)
            errors.append(torch.empty(up(n, BM), up(d_out, BN), device=x_cD.device))
            k.miss[(up(n, BM), up(d_out, BN))](acts, W_dec_FD, e_cD, list_F, count, scale, grad, errors[-1], n, n_latents, d_out, **tile)
            k.gradients[(wide, up(d_out, BN))](acts, grad, count, held["dec"], held["unused"], n, n_latents, d_out, FIRST=first, **tile)
            k.scores[(up(n, BM), wide)](grad, W_dec_FD, b_enc_F, list_F, count, acts, n, n_latents, d_out, MODE=k.MASK, **tile)
            k.gradients[(wide, up(d_in, BN))](acts, x_cD, count, held["enc"], held["b"], n, n_latents, d_in, FIRST=first, **tile)
        grads["W_enc"].place_rows(slots_F, held["enc"])
        grads["W_dec"].place_rows(slots_F, held["dec"])
        grads["b_enc"] = grads["b_enc"] + torch.where(dead_F, held["b"][slots_F.clamp_min(0).long()], 0.0)
        return alpha * torch.stack([error.sum() for error in errors]).sum() / spread  # tiles write 0 where nothing is dead

    def _buffers(self, shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> dict[str, Tensor]:
        held = self._held
        if held is None or any(held[name].shape != shape or held[name].device != like.device for name, shape in shapes.items()):
            self._held = held = {name: torch.empty(shape, device=like.device) for name, shape in shapes.items()}
        return held
