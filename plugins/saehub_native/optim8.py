"""Parameters and gradients in, updated parameters out: Adam whose moments of matrices take a byte a number, in plain torch.

Quantised by blocks of `BLOCK` neighbours in a row, with one float32 scale, the largest absolute value of the block (Dettmers et al. 2022, arXiv
2110.02861). A code c of `LAST` stands for the share of the scale whose float32 bits are ONE − (LAST − c)·2²⁰, and 0 for zero: three bits of mantissa,
so that a code's value is at most an eighth above the one before, over 15 binades for m (seven bits and a sign) and 31 for v (eight bits).

Shares are rounded up or down at random, in proportion, by a hash of (place, step): the second moment changes by a thousandth a step, which
rounding to the nearest would lose for ever. v is never rounded to 0: m/√v would explode. The Triton kernel (kernels/triton_latents.py) does the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saehub_native.optim import Adam

BLOCK = 256
LAST_M, LAST_V = 127, 255
ONE = 0x3F800000
ROWS = 1 << 20  # numbers of one chunk, at least one row


def noise(index_N: Tensor, salt: int | Tensor) -> Tensor:
    """32 random bits of (index, salt), in int64: two rounds of multiply and shift (C. Wellons' lowbias32)."""
    mask = 0xFFFFFFFF
    h = (index_N * 0x9E3779B1 + salt) & mask
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
    return h ^ (h >> 16)


def decoded(codes: Tensor, last: int) -> Tensor:
    """float32 shares of codes 0 … last."""
    bits = ONE - ((last - codes.int()) << 20)
    return torch.where(codes == 0, 0.0, bits.view(torch.float32))


def encoded(share: Tensor, random: Tensor, last: int, keep: bool) -> Tensor:
    """int32 codes of float32 shares in [0, 1]; `random`: int in [0, 2²⁰); `keep`: what is positive never becomes 0."""
    bits, lowest = share.view(torch.int32), ONE - ((last - 1) << 20)
    code = ((bits + random.int() - lowest) >> 20) + 1
    smallest = float(torch.tensor(lowest, dtype=torch.int32).view(torch.float32))
    below = (random.float() < share / smallest * 2.0**20).int()
    code = torch.where(bits < lowest, below, code)
    code = code.clamp_min(1) if keep else code
    return torch.where(share > 0, code.clamp_max(last), 0)


def spread_scales(scales_RS: Tensor, d: int) -> Tensor:
    """One scale for each of a row's d numbers."""
    return scales_RS.repeat_interleave(BLOCK, dim=1, output_size=scales_RS.shape[1] * BLOCK)[:, :d]


def block_maxima(x_RD: Tensor) -> Tensor:
    """The largest of each block: [R, ⌈d/BLOCK⌉]."""
    return torch.nn.functional.pad(x_RD, (0, -x_RD.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).amax(2)


class Adam8(Adam):
    """As `Adam`, with `m` and `v` of matrices as uint8 codes and scales `m_scale`, `v_scale`; vectors keep float32."""

    def __init__(self, params: Mapping[str, Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__({name: p for name, p in params.items() if p.ndim != 2}, betas, eps)
        self.params = dict(params)
        self.block_scales: dict[str, dict[str, Tensor]] = {"m": {}, "v": {}}
        for name, p in params.items():
            if p.ndim == 2:
                for kind in ("m", "v"):
                    getattr(self, kind)[name] = torch.zeros_like(p, dtype=torch.uint8)
                    self.block_scales[kind][name] = p.new_zeros(p.shape[0], -(-p.shape[1] // BLOCK))

    def apply_dense(self, name: str, g: Tensor, size: float | Tensor, spread: float | Tensor) -> None:
        if name not in self.block_scales["m"]:
            super().apply_dense(name, g, size, spread)
            return
        d = g.shape[1]
        rows = max(1, ROWS // d)
        for at in range(0, g.shape[0], rows):
            self._rows(name, slice(at, min(g.shape[0], at + rows)), g[at : at + rows], size, spread)

    def _rows(self, name: str, here: slice, g_RD: Tensor, size: float | Tensor, spread: float | Tensor) -> None:
        (beta1, beta2), d = self.betas, g_RD.shape[1]
        m_RD, v_RD = self.moments(name, here)
        m_RD.lerp_(g_RD, 1 - beta1)
        v_RD.mul_(beta2).addcmul_(g_RD, g_RD, value=1 - beta2)
        self.params[name][here] -= m_RD / (v_RD.sqrt() / spread + self.eps) * size
        index_RD = torch.arange(here.start * d, here.stop * d, device=g_RD.device).view(-1, d)
        random_RD = noise(index_RD, self.now.long() if isinstance(self.now, Tensor) else int(self.now))
        for kind, x_RD, random, last in (("m", m_RD, random_RD & 0xFFFFF, LAST_M), ("v", v_RD, random_RD >> 12, LAST_V)):
            scales_RS = block_maxima(x_RD.abs())
            share_RD = x_RD.abs() / spread_scales(torch.where(scales_RS > 0, scales_RS, 1.0), d)
            codes_RD = encoded(share_RD, random, last, kind == "v")
            if kind == "m":
                codes_RD = torch.where((x_RD < 0) & (codes_RD > 0), codes_RD + 128, codes_RD)
            getattr(self, kind)[name][here] = codes_RD.to(torch.uint8)
            self.block_scales[kind][name][here] = scales_RS

    def moments(self, name: str, here: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """m and v of some rows of a matrix, float32."""
        m_code, v_code = self.m[name][here].int(), self.v[name][here].int()
        d = m_code.shape[1]
        m_RD = decoded(m_code & 127, LAST_M) * spread_scales(self.block_scales["m"][name][here], d)
        v_RD = decoded(v_code, LAST_V) * spread_scales(self.block_scales["v"][name][here], d)
        return torch.where(m_code > 127, -m_RD, m_RD), v_RD

    def scales_of(self, name: str) -> tuple[Tensor, Tensor]:
        """The scales of m and of v of a matrix, float32 [F, ⌈d/BLOCK⌉]."""
        return self.block_scales["m"][name], self.block_scales["v"][name]

    def state(self) -> dict[str, Tensor]:
        """`m.<name>`, `v.<name>`, and `m_scale.<name>`, `v_scale.<name>` of matrices."""
        return super().state() | {f"{kind}_scale.{name}": t for kind, scales in self.block_scales.items() for name, t in scales.items()}

    def restart(self, name: str, rows_N: Tensor) -> None:
        super().restart(name, rows_N)
        for scales in self.block_scales.values():
            if name in scales:
                scales[name][rows_N] = 0

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, object], t: int) -> None:
        super().load_state(tensors, scalars, t)
        for kind, scales in self.block_scales.items():
            for name, tensor in scales.items():
                tensor.copy_(tensors[f"{kind}_scale.{name}"])
