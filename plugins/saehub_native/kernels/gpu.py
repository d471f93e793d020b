"""Rows, weights and k in; the float32 selection, reconstructions and gradients out, by Triton kernels.

Selection. A low-precision product ranks the latents and leaves group maxima behind; the n-th largest of those bounds the n-th largest score, so
that what lies above it, k + r latents or a few more, is recomputed in float32, and the k largest of it are the row's. A latent below that bar could
belong there only if its score were wrong by more than v_k − t; rows in which that distance is under `GUARD` times the errors that the
candidates' own scores had, and rows with more candidates than there is room for, are selected from a float32 product instead. So r sets the
work, not the result; every `AUDIT_EVERY` selections some rows are compared with float64, and a miss doubles r. Scores exist for a chunk of rows at a time.

Gradients. As on a CPU, `latent_sums` returns `RowSums`, and `update` forms a latent's row, projects it, takes the Adam step and writes the
low-precision copy while the row is in registers. Pairs are grouped by a stable sort, not by atomics: sums are the same bits every time.

Apart from an audit, a step of the TopK and AbsTopK architectures never waits for the device: what depends on the numbers (which rows are unsure,
which latents dead, whether to clip) is decided there. That is what lets `replay.py` record it.

Not yet measured on a GPU: chosen by `SAEHUB_KERNELS=gpu` only. Under TRITON_INTERPRET=1 it runs on a processor, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.seeds import generator
from saehub_native.kernels import Firing
from saehub_native.kernels.audit import missed_rows
from saehub_native.kernels.gpu_batch import BatchChoice
from saehub_native.kernels.gpu_common import GROUP, GUARD, MAX_GROUPS, SCORE_BYTES, listed, numbers, power, warps_for
from saehub_native.kernels.gpu_dead import DeadLatents, best_precision
from saehub_native.kernels.lazy import Part, RowSums
from saehub_native.kernels.reference import ReferenceKernels

if TYPE_CHECKING:
    from saehub_native.optim import Adam

R_START, R_MAX = 32, 1024
AUDIT_EVERY, AUDIT_ROWS = 100, 8
TINY = 1e-12
KINDS = ("bfloat16", "library", "float32")
"""What ranks: our bfloat16 product, torch's bfloat16 product and our epilogue, or torch's float32 product and our epilogue."""
TILES, SMALL_TILES = (128, 256, 64, 8, 3), (64, 128, 32, 4, 3)
"""Of the bfloat16 product: rows, latents and inputs of a tile; warps; stages. The first takes 144 KiB of shared memory, the second 36."""


def best_kind() -> str:
    """What ranks on this device, by what it can do."""
    return "bfloat16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def best_tiles() -> tuple[int, int, int, int, int]:
    """The larger tiles where a block can have so much shared memory."""
    if not torch.cuda.is_available():
        return TILES
    there = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "shared_memory_per_block_optin", 0)
    return TILES if there >= 160 << 10 else SMALL_TILES


class GpuKernels(BatchChoice, DeadLatents, ReferenceKernels):
    """Implements `saehub_native.kernels.Kernels` with Triton on CUDA tensors (or on any, interpreted)."""

    name = "gpu"

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        from saehub_native.kernels import triton_batch, triton_dead, triton_encode, triton_latents

        self.encoding, self.on_latents, self.on_batch, self.on_dead = triton_encode, triton_latents, triton_batch, triton_dead
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.kind, self.tiles, self.precision = kind or best_kind(), best_tiles(), best_precision()
        self.r, self.selections, self.audited, self.missed = R_START, 0, 0, 0
        self.again: Tensor | None = None
        """0-dimensional, on the device: rows of the last selection that were taken from a float32 product."""
        self._copy: tuple[Tensor, int, Tensor] | None = None  # weight, its version, and itself in bfloat16

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """What a resumed training needs to go the same way."""
        return {"rank": self.kind, **{name: getattr(self, name) for name in ("r", "selections", "audited", "missed", "fullest")}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.kind = state.get("rank", self.kind)
        for name in ("r", "selections", "audited", "missed", "fullest"):
            setattr(self, name, int(state[name]))
        self._copy = None

    def cautions(self) -> list[str]:
        """What the audit found."""
        if not self.missed:
            return []
        return [
            f"the audit found {self.missed} of {self.audited:,} rows whose selection was not the float32 one; candidates a row were raised to k + {self.r}"
        ]

    # ------------------------------------------------------------------ selection
    def low(self, W_FD: Tensor) -> Tensor:
        """W in the ranking product's dtype, as `update` left it, or made anew, at the same address, when something else changed W."""
        if self.kind == "float32":
            return W_FD
        held = self._copy
        if held is None or held[0] is not W_FD:
            self._copy = held = (W_FD, W_FD._version, W_FD.to(torch.bfloat16))
        elif held[1] != W_FD._version:
            held[2].copy_(W_FD)
            self._copy = held = (W_FD, W_FD._version, held[2])
        return held[2]

    def ranks(self, n_latents: int, wanted: int) -> bool:
        """Whether a low-precision product ranks so many latents, or they are few enough for float32 at once."""
        n_groups = -(-n_latents // GROUP)
        return 2 * wanted <= n_groups <= MAX_GROUPS

    def encode_select(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: str = "top") -> tuple[Tensor, Tensor]:
        n_latents = W_enc_FD.shape[0]
        if rule not in ("top", "abs") or not self.ranks(n_latents, k + self.r):
            return super().encode_select(x_BD, W_enc_FD, b_enc_F, k, rule)  # group-max reads every pre-activation anyway; small ones fit
        x_BD, self.again = x_BD.contiguous(), None
        chunk = max(64, min(x_BD.shape[0], SCORE_BYTES // ((4 if self.kind == "float32" else 2) * n_latents)))
        parts = [self._select(x_BD[at : at + chunk], W_enc_FD, b_enc_F, k, rule) for at in range(0, x_BD.shape[0], chunk)]
        values_BK, indices_BK = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.audit_due():
            self._audit(x_BD, W_enc_FD, b_enc_F, values_BK, indices_BK, k, rule)
        self.selections += 1
        return values_BK, indices_BK

    def _select(self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, k: int, rule: str) -> tuple[Tensor, Tensor]:
        by_size = rule == "abs"
        scores_BF, maxima_BG = self.scores(x_BD, W_FD, b_F, by_size)
        exact_BC, score_BC, indices_BC, counts_B, bar_B = self.candidates(x_BD, W_FD, b_F, k + self.r, scores_BF, maxima_BG)
        ranked_BC = exact_BC.abs() if by_size else exact_BC
        here_BC = torch.arange(exact_BC.shape[1], device=x_BD.device) < counts_B.unsqueeze(1)
        top_BK = torch.where(here_BC, ranked_BC, -torch.inf).topk(k, dim=1)
        values_BK, indices_BK = exact_BC.gather(1, top_BK.indices), indices_BC.gather(1, top_BK.indices)
        values_BK = values_BK if by_size else values_BK.relu()
        miss_BC = torch.where(here_BC, (exact_BC.abs() if by_size else exact_BC.relu()) - score_BC, 0)
        spread_B = (miss_BC.square().sum(1) / counts_B.clamp_min(1)).sqrt()
        kth_B = top_BK.values[:, -1]
        unsure_B = (counts_B > exact_BC.shape[1]) | (counts_B < k) | ~(kth_B - bar_B >= GUARD * spread_B)
        self._settle(x_BD, W_FD, b_F, values_BK, indices_BK, unsure_B, scores_BF, k, by_size)
        return values_BK, indices_BK

    def _settle(
        self,
        x_BD: Tensor,
        W_FD: Tensor,
        b_F: Tensor,
        values_BK: Tensor,
        indices_BK: Tensor,
        unsure_B: Tensor,
        scores_BF: Tensor,
        k: int,
        by_size: bool,
    ) -> None:
        """Select the unsure rows, in place, from a float32 product: in waves of as many as fit where the scores, now spent, were."""
        n_rows, (n_latents, d), e = len(unsure_B), W_FD.shape, self.encoding
        rows_B, count = listed(unsure_B)
        self.again = count if self.again is None else self.again + count
        spent = scores_BF.view(-1).view(torch.float32) if scores_BF.numel() % 2 == 0 or scores_BF.dtype == torch.float32 else None
        room = 0 if spent is None else spent.numel() // n_latents
        if room == 0:
            room = n_rows
            spent = torch.empty(room * n_latents, device=x_BD.device)
        BM, BN, BK = (16, 64, 32) if not self.interpreted else (16, 128, 128)
        block = 1024
        for first in range(0, n_rows, room):
            e.exact[(2, -(-n_latents // BN))](x_BD, W_FD, b_F, rows_B, count, spent, first, room, n_latents, d, BM=BM, BN=BN, BK=BK)
            e.choose[(min(room, n_rows - first),)](
                spent, rows_B, count, values_BK, indices_BK, first, n_latents, k, BY_SIZE=by_size, BLOCK=block
            )

    def scores(
        self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, by_size: bool, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ranking scores [B, F] (bfloat16, or float32) and their group maxima, float32 [B, ⌈F/GROUP⌉]; `out` takes them."""
        n_rows, (n_latents, d), e = x_BD.shape[0], W_FD.shape, self.encoding
        n_groups, low_FD = -(-n_latents // GROUP), self.low(W_FD)
        if out is None:
            dtype = torch.float32 if self.interpreted else low_FD.dtype
            out = torch.empty(n_rows, n_latents, device=x_BD.device, dtype=dtype), torch.empty(n_rows, n_groups, device=x_BD.device)
        scores_BF, maxima_BG = out
        low_BD = x_BD.to(low_FD.dtype)
        if self.kind == "bfloat16":
            BM, BN, BK, warps, stages = (32, 128, 32, 4, 1) if self.interpreted else self.tiles
            e.encode[(-(-n_rows // BM), -(-n_latents // BN))](
                low_BD, low_FD, b_F, scores_BF, maxima_BG, n_rows, n_latents, d,
                UPCAST=self.interpreted, BY_SIZE=by_size, GROUP=GROUP, BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        else:
            if scores_BF.dtype == low_BD.dtype:
                torch.mm(low_BD, low_FD.t(), out=scores_BF)
            else:
                scores_BF.copy_(low_BD.float() @ low_FD.float().t())
            groups = 128
            e.finish[(n_rows, -(-n_groups // groups))](scores_BF, b_F, maxima_BG, n_latents, BY_SIZE=by_size, GROUP=GROUP, GROUPS=groups)
        return scores_BF, maxima_BG

    def candidates(
        self,
        x_BD: Tensor,
        W_FD: Tensor,
        b_F: Tensor,
        wanted: int,
        scores_BF: Tensor,
        maxima_BG: Tensor,
        bar_B: Tensor | None = None,
        capacity: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The latents of each row whose ranking score reaches the `wanted`-th largest group maximum, or `bar_B`: exact values float32 [B, C], their
        scores, their indices int64 [B, C] (places beyond the count hold 0), the counts [B] (above C: cut off), and that bar [B]."""
        n_rows, (n_latents, d), e = x_BD.shape[0], W_FD.shape, self.encoding
        device, n_groups, capacity = x_BD.device, maxima_BG.shape[1], capacity or 2 * wanted
        if bar_B is None:
            bar_B = torch.empty(n_rows, device=device)
            e.threshold[(n_rows,)](maxima_BG, bar_B, n_groups, wanted, BLOCK=power(n_groups))
        indices_BC = torch.zeros(n_rows, capacity, device=device, dtype=torch.int32)
        counts_B = torch.empty(n_rows, device=device, dtype=torch.int32)
        values_BC = torch.zeros(n_rows, capacity, device=device)
        e.gather[(n_rows,)](scores_BF, maxima_BG, bar_B, indices_BC, counts_B, n_latents, capacity, GROUP=GROUP, GROUPS=64)
        block = 16
        e.refine[(n_rows, -(-capacity // block))](x_BD, W_FD, b_F, indices_BC, counts_B, values_BC, d, capacity, BLOCK=block, D=power(d))
        indices_BC = indices_BC.long()
        return values_BC, scores_BF.gather(1, indices_BC).float(), indices_BC, counts_B, bar_B

    # ------------------------------------------------------------------ audit
    def audit_due(self) -> bool:
        """Whether the next selection is one that is audited, which waits for the device."""
        return self.selections % AUDIT_EVERY == 0

    def _audit(
        self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, values_BK: Tensor, indices_BK: Tensor, k: int, rule: str, cut: float = 0.0
    ) -> None:
        """Compare some rows, drawn from the number of the selection, with float64; raise r after a miss."""
        rows_A = torch.randperm(x_BD.shape[0], generator=generator("audit", self.selections))[:AUDIT_ROWS].to(x_BD.device)
        missed = missed_rows(x_BD[rows_A], W_FD, b_F, values_BK[rows_A], indices_BK[rows_A], k, rule, cut)
        self.audited += len(rows_A)
        if bool(missed.any()) and bool(x_BD.isfinite().all()):
            self.missed += int(missed.sum())
            self.r = min(R_MAX, 2 * self.r)

    # ------------------------------------------------------------------ reconstruction
    def reconstruct(
        self, target_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (n_rows, d), k = target_BD.shape, values_BK.shape[1]
        grad_BD, delta_BK = torch.empty_like(target_BD), torch.empty_like(values_BK)
        error_B = torch.empty(n_rows, device=target_BD.device)
        inputs = target_BD, indices_BK.contiguous(), values_BK.contiguous(), W_dec_FD, float(weight)
        K = max(16, power(k))
        self.on_latents.reconstruct[(n_rows,)](
            *inputs, grad_BD, delta_BK, error_B, d, k, K=K, C=max(16, min(power(d), (1 << 14) // K)), num_warps=8
        )
        return target_BD, grad_BD, delta_BK, error_B.double().sum().float()

    # ------------------------------------------------------------------ sums over latents
    def group(self, indices_BK: Tensor, n_latents: int, values_BK: Tensor | None = None) -> Firing:
        latents_N = indices_BK.reshape(-1).int()
        if values_BK is not None:  # pairs of value 0 go behind the last latent, where nobody looks
            latents_N = torch.where(values_BK.reshape(-1) == 0, n_latents, latents_N).int()
        sorted_N, order_N = torch.sort(latents_N, stable=True)
        edges_F = torch.searchsorted(sorted_N, torch.arange(n_latents + 1, device=latents_N.device, dtype=torch.int32))
        return Firing(order_N, order_N // indices_BK.shape[1], edges_F[:-1], edges_F.diff())

    def fired(self, indices_BK: Tensor, active_BK: Tensor, n_latents: int) -> Tensor:
        """bool [F]: which latents are active somewhere."""
        counts_F = torch.zeros(n_latents, device=indices_BK.device, dtype=torch.int32)
        return counts_F.scatter_add_(0, indices_BK.reshape(-1), active_BK.reshape(-1).int()) > 0

    def latent_sums(self, firing: Firing, weights_BK: Tensor, source_BD: Tensor) -> Tensor | RowSums:
        n_latents = firing.counts_F.numel()
        if source_BD.shape[1] == 1:
            out_F = torch.empty(n_latents, device=source_BD.device)
            pairs = firing.offsets_F, firing.counts_F, firing.rows_N, firing.order_N, weights_BK.reshape(-1)
            self.on_latents.totals[(n_latents,)](*pairs, source_BD, out_F, BLOCK=128, num_warps=1)
            return out_F.unsqueeze(1)
        if not self.lazy:
            return super().latent_sums(firing, weights_BK, source_BD)
        return RowSums(self, [Part(firing, weights_BK.reshape(-1), source_BD.contiguous(), n_latents)])

    def _latents(
        self, sums: RowSums, mode: int, W_FD: Tensor, m: Sequence[Tensor], v: Sequence[Tensor], out: Tensor, scalars: Tensor,
        shadow: bool = False, betas: tuple[float, float] = (0.0, 0.0), eps: float = 0.0,
    ) -> None:  # fmt: skip
        """`scalars`: the `numbers` as the kernel has them; m and v: (float32, anything), or (codes, scales)."""
        d, slots_F, D = W_FD.shape[1], sums.slots_F(), power(W_FD.shape[1])
        extra = W_FD if sums.extra is None else sums.extra[1]
        before, bits = 0, 8 if m[0].dtype == torch.uint8 else 32
        for part in sums.parts:
            here = slice(before, before + part.n_latents)
            firing = part.firing
            self.on_latents.latents[(part.n_latents,)](
                firing.offsets_F, firing.counts_F, firing.rows_N, firing.order_N, part.weights_N, part.source_BD, slots_F[here], extra,
                W_FD[here], m[0][here], v[0][here], m[1][here], v[1][here], out[here], scalars, before, d,
                1 - betas[0], betas[1], 1 - betas[1], eps, TINY,
                SPHERE=sums.sphere, EXTRA=sums.extra is not None, SHADOW=shadow, MODE=mode, BITS=bits, D=D, BLOCK=min(256, D), num_warps=warps_for(D),
            )  # fmt: skip
            before += part.n_latents

    def dense_gradient(self, sums: RowSums, weight_FD: Tensor | None) -> Tensor:
        """The [F, d] tensor of a gradient."""
        if sums.sphere and weight_FD is None:
            raise ValueError("a projected gradient needs its weight")
        out_FD = sums.parts[0].source_BD.new_empty(sums.shape)
        W_FD = out_FD.zero_() if weight_FD is None else weight_FD
        self._latents(sums, self.on_latents.STORE, W_FD, (W_FD, W_FD), (W_FD, W_FD), out_FD, numbers(W_FD, sums.factor, 0, 1, 0, 1))
        return out_FD

    def square(self, sums: RowSums, weight_FD: Tensor) -> float:
        """Σ of the squares of a gradient, without holding it."""
        return float(self._square(sums, weight_FD, weight_FD.new_ones(())))

    def _square(self, sums: RowSums, W_FD: Tensor, wanted: Tensor) -> Tensor:
        squares_F = W_FD.new_zeros(W_FD.shape[0])
        self._latents(sums, self.on_latents.SQUARE, W_FD, (W_FD, W_FD), (W_FD, W_FD), squares_F, numbers(W_FD, 1, 0, 1, 0, wanted))
        return squares_F.double().sum() * sums.factor**2

    def square_bound(self, sums: RowSums) -> float:
        """At least `square`, in a small share of its time: |Σ w s| ≤ Σ |w| |s|, and projecting shortens."""
        return float(self._square_bound(sums))

    def _square_bound(self, sums: RowSums) -> Tensor:
        slots_F, d, before, parts = sums.slots_F(), sums.shape[1], 0, []
        for part in sums.parts:
            firing, norms_B = part.firing, part.source_BD.norm(dim=1)
            extra = norms_B if sums.extra is None else sums.extra[1]
            parts.append(norms_B.new_empty(part.n_latents))
            self.on_latents.bound[(part.n_latents,)](
                firing.offsets_F, firing.counts_F, firing.rows_N, firing.order_N, part.weights_N, norms_B,
                slots_F[before : before + part.n_latents], extra, parts[-1], d, EXTRA=sums.extra is not None, BLOCK=128, D=power(d), num_warps=1,
            )  # fmt: skip
            before += part.n_latents
        return torch.cat(parts).double().sum() * sums.factor**2 * (1 + 1e-4)

    def clip_factor(self, params: Mapping[str, Tensor], plain: Sequence[Tensor], lazy: Mapping[str, RowSums], largest: float) -> Tensor:
        """min(1, largest / |g|) over all gradients, 0-dimensional. Where a bound of the norm is small enough already, which the device decides,
        the programs that would form it end at once."""
        square = sum(
            (g.norm().double().square() for g in plain), torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
        )
        bounded = square + sum(self._square_bound(g) for g in lazy.values())
        wanted = (~(bounded <= largest**2)).float()  # NaN: not bounded
        square = square + sum(self._square(g, params[name], wanted) for name, g in lazy.items())
        return torch.where(wanted > 0, (largest / square.sqrt().clamp_min(1e-30)).clamp_max(1.0), 1.0).float()

    # ------------------------------------------------------------------ update
    def update(self, optimizer: Adam, name: str, sums: RowSums, size: float | Tensor, spread: float | Tensor) -> None:
        """One Adam step of the weight `name`, in place: what `Adam.step` does with a tensor. The bfloat16 copy follows."""
        W_FD, m_FD, v_FD = optimizer.params[name], optimizer.m[name], optimizer.v[name]
        scales = getattr(optimizer, "scales_of", lambda _: (W_FD, W_FD))(name)
        held = self._copy
        shadow = held is not None and held[0] is W_FD
        m, v = (m_FD, scales[0]), (v_FD, scales[1])
        scalars = numbers(W_FD, sums.factor, size, spread, optimizer.now, 1)
        self._latents(
            sums, self.on_latents.UPDATE, W_FD, m, v, held[2] if shadow else W_FD, scalars, shadow, optimizer.betas, optimizer.eps
        )
        for tensor in (W_FD, m_FD, v_FD):  # the kernel writes past torch's sight
            torch.autograd.graph.increment_version(tensor)
        if shadow:
            self._copy = (W_FD, W_FD._version, held[2])
