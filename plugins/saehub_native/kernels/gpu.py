"""Rows, weights and k in; the float32 selection, reconstructions and gradients out, by Triton kernels.

Selection. A bfloat16 product ranks the latents and leaves group maxima behind; the n-th largest of those bounds the n-th largest score, so that
what lies above it, k + r latents or a few more, is recomputed in float32, and the k largest of it are the row's. A latent below that bar could
belong there only if its score were wrong by more than v_k − t; rows in which that distance is under `GUARD` times the errors that the
candidates' own scores had, and rows with more candidates than there is room for, are selected from a float32 product instead. So r sets the
work, not the result; every `AUDIT_EVERY` selections some rows are compared with float64, and a miss doubles r. Scores exist for a chunk of rows at a time.

Gradients. As on a CPU, `latent_sums` returns `RowSums`, and `update` forms a latent's row, projects it, takes the Adam step and writes the
low-precision copy while the row is in registers. Pairs are grouped by a stable sort, not by atomics: sums are the same bits every time.

Not yet measured on a GPU: chosen by `SAEHUB_KERNELS=gpu` only. Under TRITON_INTERPRET=1 it runs on a processor, for tests.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.seeds import generator
from saehub_native.kernels import Firing
from saehub_native.kernels.audit import missed_rows
from saehub_native.kernels.lazy import Part, RowSums
from saehub_native.kernels.reference import ReferenceKernels

if TYPE_CHECKING:
    from saehub_native.optim import Adam

R_START, R_MAX = 32, 1024
GUARD = 6.0
AUDIT_EVERY, AUDIT_ROWS = 100, 8
GROUP = 16
SCORE_BYTES = 512 << 20  # scores of one chunk of rows
MAX_GROUPS = 1 << 15  # group maxima of a row that one program can hold
TINY = 1e-12


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


class GpuKernels(ReferenceKernels):
    """Implements `saehub_native.kernels.Kernels` with Triton on CUDA tensors (or on any, interpreted)."""

    name = "gpu"

    def __init__(self) -> None:
        super().__init__()
        from saehub_native.kernels import triton_encode, triton_latents

        self.encoding, self.on_latents = triton_encode, triton_latents
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.r, self.selections, self.audited, self.missed = R_START, 0, 0, 0
        self.again = 0
        """Rows of the last selection that were taken from a float32 product."""
        self._copy: tuple[Tensor, int, Tensor] | None = None  # weight, its version, and itself in bfloat16

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """What a resumed training needs to go the same way."""
        return {name: getattr(self, name) for name in ("r", "selections", "audited", "missed", "fullest")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        for name in ("r", "selections", "audited", "missed", "fullest"):
            setattr(self, name, int(state[name]))
        self._copy = None

    def cautions(self) -> list[str]:
        """What the audit found."""
        if not self.missed:
            return []
        return [f"the audit found {self.missed} of {self.audited:,} rows whose selection was not the float32 one; candidates a row were raised to k + {self.r}"]

    # ------------------------------------------------------------------ selection
    def _low(self, W_FD: Tensor) -> Tensor:
        """W in bfloat16, as `update` left it, or made anew when something else changed W."""
        held = self._copy
        if held is None or held[0] is not W_FD or held[1] != W_FD._version:
            self._copy = held = (W_FD, W_FD._version, W_FD.to(torch.bfloat16))
        return held[2]

    def encode_select(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: str = "top") -> tuple[Tensor, Tensor]:
        n_latents = W_enc_FD.shape[0]
        n_groups = -(-n_latents // GROUP)
        if rule not in ("top", "abs") or n_groups < 2 * (k + self.r) or n_groups > MAX_GROUPS:
            return super().encode_select(x_BD, W_enc_FD, b_enc_F, k, rule)  # group-max reads every pre-activation anyway; small ones fit
        x_BD, self.again = x_BD.contiguous(), 0
        chunk = max(64, min(x_BD.shape[0], SCORE_BYTES // (2 * n_latents)))
        parts = [self._select(x_BD[at : at + chunk], W_enc_FD, b_enc_F, k, rule) for at in range(0, x_BD.shape[0], chunk)]
        values_BK, indices_BK = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.selections % AUDIT_EVERY == 0:
            self._audit(x_BD, W_enc_FD, b_enc_F, values_BK, indices_BK, k, rule == "abs")
        self.selections += 1
        return values_BK, indices_BK

    def _select(self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, k: int, rule: str) -> tuple[Tensor, Tensor]:
        exact_BC, score_BC, indices_BC, counts_B, bar_B = self.candidates(x_BD, W_FD, b_F, k + self.r, rule == "abs")
        by_size = rule == "abs"
        ranked_BC = exact_BC.abs() if by_size else exact_BC
        here_BC = torch.arange(exact_BC.shape[1], device=x_BD.device) < counts_B.unsqueeze(1)
        top_BK = torch.where(here_BC, ranked_BC, -torch.inf).topk(k, dim=1)
        values_BK, indices_BK = exact_BC.gather(1, top_BK.indices), indices_BC.gather(1, top_BK.indices)
        values_BK = values_BK if by_size else values_BK.relu()
        miss_BC = torch.where(here_BC, (exact_BC.abs() if by_size else exact_BC.relu()) - score_BC, 0)
        spread_B = (miss_BC.square().sum(1) / counts_B.clamp_min(1)).sqrt()
        kth_B = top_BK.values[:, -1]
        unsure_B = (counts_B > exact_BC.shape[1]) | (counts_B < k) | ~(kth_B - bar_B >= GUARD * spread_B)
        rows_N = unsure_B.nonzero().squeeze(1)
        self.again += rows_N.numel()
        if rows_N.numel():
            values_BK[rows_N], indices_BK[rows_N] = super().encode_select(x_BD[rows_N], W_FD, b_F, k, rule)
        return values_BK, indices_BK

    def candidates(self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, wanted: int, by_size: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The latents of each row whose ranking score reaches the `wanted`-th largest group maximum: exact values float32 [B, C], their scores,
        their indices int64 [B, C] (places beyond the count hold 0), the counts [B] (above C: cut off), and that maximum [B]."""
        n_rows, (n_latents, d) = x_BD.shape[0], W_FD.shape
        device, n_groups, capacity = x_BD.device, -(-n_latents // GROUP), 2 * wanted
        scores_BF = torch.empty(n_rows, n_latents, device=device, dtype=torch.float32 if self.interpreted else torch.bfloat16)
        maxima_BG, bar_B = torch.empty(n_rows, n_groups, device=device), torch.empty(n_rows, device=device)
        indices_BC = torch.zeros(n_rows, capacity, device=device, dtype=torch.int32)
        counts_B = torch.empty(n_rows, device=device, dtype=torch.int32)
        values_BC = torch.zeros(n_rows, capacity, device=device)
        BM, BN, BK = (32, 128, 32) if self.interpreted else (128, 128, 64)
        e = self.encoding
        grid = (-(-n_rows // BM), -(-n_latents // BN))
        options = {} if self.interpreted else {"num_warps": 8, "num_stages": 3}
        low_BD = x_BD.to(torch.bfloat16)
        e.encode[grid](
            low_BD, self._low(W_FD), b_F, scores_BF, maxima_BG, n_rows, n_latents, d,
            UPCAST=self.interpreted, BY_SIZE=by_size, GROUP=GROUP, BM=BM, BN=BN, BK=BK, **options,
        )  # fmt: skip
        e.threshold[(n_rows,)](maxima_BG, bar_B, n_groups, wanted, BLOCK=_power(n_groups))
        e.gather[(n_rows,)](scores_BF, maxima_BG, bar_B, indices_BC, counts_B, n_latents, capacity, GROUP=GROUP, GROUPS=64)
        block = 16
        e.refine[(n_rows, -(-capacity // block))](x_BD, W_FD, b_F, indices_BC, counts_B, values_BC, d, capacity, BLOCK=block, D=_power(d))
        indices_BC = indices_BC.long()
        return values_BC, scores_BF.gather(1, indices_BC).float(), indices_BC, counts_B, bar_B

    def _audit(self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, values_BK: Tensor, indices_BK: Tensor, k: int, by_size: bool) -> None:
        """Compare some rows, drawn from the number of the selection, with float64; raise r after a miss."""
        rows_A = torch.randperm(x_BD.shape[0], generator=generator("audit", self.selections))[:AUDIT_ROWS].to(x_BD.device)
        missed = missed_rows(x_BD[rows_A], W_FD, b_F, values_BK[rows_A], indices_BK[rows_A], k, "abs" if by_size else "top")
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
        self.on_latents.reconstruct[(n_rows,)](
            target_BD, indices_BK.contiguous(), values_BK.contiguous(), W_dec_FD, float(weight), grad_BD, delta_BK, error_B, d, K=k, D=_power(d)
        )
        return target_BD, grad_BD, delta_BK, error_B.double().sum().float()

    # ------------------------------------------------------------------ sums over latents
    def latent_sums(self, firing: Firing, weights_BK: Tensor, source_BD: Tensor) -> Tensor | RowSums:
        if not self.lazy or source_BD.shape[1] == 1:
            return super().latent_sums(firing, weights_BK, source_BD)
        return RowSums(self, [Part(firing, weights_BK.reshape(-1), source_BD.contiguous(), firing.counts_F.numel())])

    def _latents(self, sums: RowSums, mode: int, W_FD: Tensor, m_FD: Tensor, v_FD: Tensor, out: Tensor, numbers: tuple[float, ...], shadow: bool = False) -> None:
        d, slots_F = W_FD.shape[1], sums.slots_F().to(W_FD.device)
        extra = W_FD if sums.extra is None else sums.extra[1]
        before = 0
        for part in sums.parts:
            here = slice(before, before + part.n_latents)
            firing = part.firing
            self.on_latents.latents[(part.n_latents,)](
                firing.offsets_F, firing.counts_F, firing.rows_N, firing.order_N, part.weights_N, part.source_BD, slots_F[here], extra,
                W_FD[here], m_FD[here], v_FD[here], out[here], d, *numbers, TINY,
                SPHERE=sums.sphere, EXTRA=sums.extra is not None, SHADOW=shadow, MODE=mode, D=_power(d),
            )  # fmt: skip
            before += part.n_latents

    def dense_gradient(self, sums: RowSums, weight_FD: Tensor | None) -> Tensor:
        """The [F, d] tensor of a gradient."""
        if sums.sphere and weight_FD is None:
            raise ValueError("a projected gradient needs its weight")
        out_FD = sums.parts[0].source_BD.new_empty(sums.shape)
        W_FD = out_FD.zero_() if weight_FD is None else weight_FD
        self._latents(sums, self.on_latents.STORE, W_FD, W_FD, W_FD, out_FD, (sums.factor, 0.0, 0.0, 0.0, 1.0, 0.0))
        return out_FD

    def square(self, sums: RowSums, weight_FD: Tensor) -> float:
        """Σ of the squares of a gradient, without holding it."""
        squares_F = weight_FD.new_empty(weight_FD.shape[0])
        self._latents(sums, self.on_latents.SQUARE, weight_FD, weight_FD, weight_FD, squares_F, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        return sums.factor**2 * float(squares_F.double().sum())

    def square_bound(self, sums: RowSums) -> float:
        """At least `square`, in a small share of its time: |Σ w s| ≤ Σ |w| |s|, and projecting shortens."""
        total = 0.0
        for part in sums.parts:
            norms_N = part.source_BD.norm(dim=1)[part.firing.rows_N]
            lengths_N = (part.weights_N[part.firing.order_N].abs() * norms_N).double()
            running_N = torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)])
            starts_F = part.firing.offsets_F[: part.n_latents]
            total += float((running_N[starts_F + part.firing.counts_F] - running_N[starts_F]).square().sum())
        if sums.extra is not None:  # |a + b|² ≤ 2 |a|² + 2 |b|²
            total = 2 * total + 2 * float(sums.extra[1].double().square().sum())
        return sums.factor**2 * total * (1 + 1e-4)

    # ------------------------------------------------------------------ update
    def update(self, optimizer: Adam, name: str, sums: RowSums, size: float, spread: float) -> None:
        """One Adam step of the weight `name`, in place: what `Adam.step` does with a tensor. The bfloat16 copy follows."""
        W_FD, m_FD, v_FD = optimizer.params[name], optimizer.m[name], optimizer.v[name]
        held = self._copy
        shadow = held is not None and held[0] is W_FD
        numbers = (sums.factor, *optimizer.betas, size, spread, optimizer.eps)
        self._latents(sums, self.on_latents.UPDATE, W_FD, m_FD, v_FD, held[2] if shadow else W_FD, numbers, shadow)
        for tensor in (W_FD, m_FD, v_FD):  # the kernel writes past torch's sight
            torch.autograd.graph.increment_version(tensor)
        if shadow:
            self._copy = (W_FD, W_FD._version, held[2])
