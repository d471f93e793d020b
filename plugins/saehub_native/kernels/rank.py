"""Encoder weights and rows in; cheap approximate pre-activations of a chunk of rows, good enough to rank latents by, out.

Three ways, by what the processor has: an int8 product (VNNI, AMX), a bfloat16 product (AVX512-BF16, AMX), or a float32 product.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub_native.kernels.scanning import Scanner
from saehub_native.kernels.team import pieces

if TYPE_CHECKING:
    from saehub_native.kernels.team import Team

KINDS = ("float32", "bfloat16", "int8")
"""The numbers that `cpu_loops` knows them by are their places here."""
CHUNK_BYTES = 64 << 20  # scores of one chunk, one for each thread: a product packs all weights anew, so it should have many rows
ROWS_A_PIECE = 64
LATENTS_A_PIECE = 512


def best_kind() -> str:
    """What this machine multiplies fastest, by capability: `int8`, `bfloat16` or `float32`."""

    def has(*names: str) -> bool:
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)

    if not hasattr(torch, "_int_mm"):
        return "float32"
    if has("_is_vnni_supported", "_is_amx_tile_supported"):
        return "int8"
    return "bfloat16" if has("_is_avx512_bf16_supported") else "float32"


class Ranker:
    """Scores by one kind of product; keeps the low-precision copies of the weights and its buffers between steps.

    int8: p ≈ s_b s_f ⟨x̂_b, ŵ_f⟩ with x̂ = round(x / (c s_b)), ŵ = round(w c / s_f), where the vector c ("smooth") takes outlying channels from
    the rows to the weights: c_i² ~ rms x_i / rms w_i, of the rows and weights at hand when the copies are first made (as in SmoothQuant, Xiao
    et al. 2023, arXiv 2211.10438).
    """

    def __init__(self, kind: str, loops: Any, team: Team):
        self.kind, self.code, self.loops, self.team = kind, KINDS.index(kind), loops, team
        self.smooth_D: Tensor | None = None
        self._of: tuple[int, int, tuple[int, ...]] | None = None
        self._own = threading.local()  # each thread's scores
        self.changes = 0
        """How often the copies were made or brought up to date."""
        self.scanner = Scanner(team) if kind == "int8" else None
        self._low: tuple[Tensor, Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ copies of the weights
    def copies(self) -> tuple[Any, ...]:
        """What a loop that changes the weights must write besides: kind, smooth, int16 copy, int8 copy, scales, as numpy arrays."""
        return (self.code, self.smooth_D.numpy(), self.low16_FD.numpy(), self.low8_FD.numpy(), self.low_scale_F.numpy())

    def fresh(self, W_enc_FD: Tensor) -> bool:
        """Whether the copies are those of this tensor as it stands."""
        return self._of == _mark(W_enc_FD)

    def forget(self) -> None:
        """The copies are of no tensor any more."""
        self._of = None

    def kept(self, W_enc_FD: Tensor) -> None:
        """The copies were brought up to date together with the weights."""
        self._of = _mark(W_enc_FD)
        self.changes += 1

    def prepare(self, x_BD: Tensor, W_enc_FD: Tensor) -> None:
        """Make the copies, unless they are those of this tensor as it stands."""
        if self.fresh(W_enc_FD):
            return
        n, d = W_enc_FD.shape
        if self.smooth_D is None or self.smooth_D.numel() != d:
            self.smooth_D = smoothing(x_BD, W_enc_FD) if self.kind == "int8" else torch.ones(d)
        self.low16_FD = torch.zeros((n, d) if self.kind == "bfloat16" else (1, 1), dtype=torch.int16)
        self.low8_FD = torch.zeros((n, d) if self.kind == "int8" else (1, 1), dtype=torch.int8)
        self.low_scale_F = torch.ones(n)
        if self.kind != "float32":
            arguments = (W_enc_FD.numpy(), *self.copies())
            self.team.run(*pieces(self.loops.shadow_rows, n, LATENTS_A_PIECE, arguments))
        self._of = _mark(W_enc_FD)
        self.changes += 1

    # ------------------------------------------------------------------ scores
    def rows(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Low-precision copies of a batch and their scales; kept until the next batch."""
        n, d = x_BD.shape
        if self._low is None or self._low[0].shape != x_BD.shape:
            low = torch.empty(n, d, dtype={"float32": torch.float32, "bfloat16": torch.int16, "int8": torch.int8}[self.kind])
            self._low = low, torch.ones(n)
        low_BD, scale_B = self._low
        if self.kind == "float32":
            low_BD.copy_(x_BD)
            return low_BD, scale_B
        low16, low8 = (low_BD, _nothing(torch.int8)) if self.kind == "bfloat16" else (_nothing(torch.int16), low_BD)
        arguments = (x_BD.numpy(), self.code, self.smooth_D.numpy(), low16.numpy(), low8.numpy(), scale_B.numpy())
        self.team.run(*pieces(self.loops.low_rows, n, ROWS_A_PIECE, arguments))
        return low_BD, scale_B

    def chunk(self, n_rows: int, n_latents: int) -> int:
        """Rows a product: as many as fit, and few enough to share among the threads."""
        size = 2 if self.kind == "bfloat16" else 4
        share = -(-n_rows // (4 * torch.get_num_threads()))
        return max(1, min(n_rows, max(64, min(512, CHUNK_BYTES // (size * n_latents), share))))

    def scores(self, low_CD: Tensor, W_enc_FD: Tensor) -> tuple[Any, Any]:
        """Scores [C, F] as (int32 bits or sums, int16 bits); the one that the kind does not use is [C, 0]."""
        out = self._room(low_CD.shape[0], W_enc_FD.shape[0])
        if self.kind == "int8":
            torch._int_mm(low_CD, self.low8_FD.t(), out=out)
        elif self.kind == "bfloat16":
            torch.mm(low_CD.view(torch.bfloat16), self.low16_FD.view(torch.bfloat16).t(), out=out)
        else:
            out = float_product(low_CD, W_enc_FD, out)
        return self._as_bits(out)

    def room(self, n_rows: int, n_latents: int) -> tuple[Any, Any]:
        """Memory for scores of this thread, in the form in which `scores` returns them."""
        return self._as_bits(self._room(n_rows, n_latents))

    def _room(self, n_rows: int, n_latents: int) -> Tensor:
        held = getattr(self._own, "scores", None)
        if held is None or held.numel() < n_rows * n_latents:
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int32}[self.kind]
            self._own.scores = held = torch.empty(n_rows * n_latents, dtype=dtype)
        return held[: n_rows * n_latents].view(n_rows, n_latents)

    def _as_bits(self, out_CF: Tensor) -> tuple[Any, Any]:
        none = out_CF.new_empty(0).view(torch.int32 if self.kind == "bfloat16" else torch.int16).view(1, 0).expand(len(out_CF), 0)
        if self.kind == "bfloat16":
            return none.numpy(), out_CF.view(torch.int16).numpy()
        return out_CF.view(torch.int32).numpy(), none.numpy()


def smoothing(x_BD: Tensor, W_enc_FD: Tensor) -> Tensor:
    """c of `Ranker`, with geometric mean 1; 1 where a channel of either is empty."""
    rms_x, rms_w = (t.double().square().mean(0).sqrt() for t in (x_BD, W_enc_FD))
    c = (rms_x / rms_w).sqrt()
    usable = c.isfinite() & (c > 0)
    if not bool(usable.any()):
        return torch.ones(x_BD.shape[1])
    c = c / c[usable].log().mean().exp()
    return torch.where(usable, c, 1.0).clamp(1e-4, 1e4).float()


def float_product(x_CD: Tensor, W_FD: Tensor, out: Tensor) -> Tensor:
    """x Wᵀ through oneDNN where torch has it (on AMD 1.1 to 1.9 times faster than its MKL), else through the default."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return torch.mm(x_CD, W_FD.t(), out=out) if linear is None else linear(x_CD, W_FD, None, "none", [], "")


def _mark(W_FD: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return W_FD.data_ptr(), W_FD._version, tuple(W_FD.shape)


def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(1, 1, dtype=dtype)
