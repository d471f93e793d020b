"""Rows, weights and k in; selected latents, reconstructions and sparse gradients out: the interface that every kernel set implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from saehub_native.kernels.lazy import RowSums

CHOICE = "SAEHUB_KERNELS"
"""Environment variable: `reference`, or `cpu`, `cpu:int8`, `cpu:bfloat16`, `cpu:float32`, or `gpu`,
`gpu:bfloat16`, `gpu:library`, `gpu:float32`, in place of what the machine suggests."""


Rule = Literal["top", "abs", "group"]


@dataclass
class Firing:
    """The (row, latent) pairs of a selection, grouped by latent: what every sparse gradient sums over."""

    order_N: Tensor
    """int64 [N ≤ B*K], position in the flattened `indices_BK` of the n-th pair, grouped by latent, rows ascending within one."""
    rows_N: Tensor
    """int64 [N], the row of that pair."""
    offsets_F: Tensor
    """int64 [F] or [F + 1], where a latent's pairs begin."""
    counts_F: Tensor
    """int64 [F], how many pairs a latent has."""


class Kernels(Protocol):
    """The operations of a sparse training step; weights of latents are rows: W_enc_FD and W_dec_FD, both [F, d] and contiguous.

    Every set of kernels gives the support of the float32 pre-activations and the gradients of dense autograd; which one is used depends on
    what the machine can do, never on timing, so that a resumed run takes the same path. All of them are deterministic, and none changes
    its inputs.
    """

    name: str
    """Recorded in a trainer's state."""
    lazy: bool
    """Whether `latent_sums` may return `RowSums`: set by a session whose architecture and optimizer take them."""

    def state(self) -> dict[str, Any]:
        """What a resumed training needs to go the same way, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        ...

    def expect_auxk(self, params: Mapping[str, Tensor], centred_BD: Tensor, dead_F: Tensor, k_aux: int, signed: bool = False) -> None:
        """Say before a selection over all latents that `add_auxk` will be asked about these rows: a hint, which no result depends on."""
        ...

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
        """What `architectures.auxk.add_auxk` says, done by the kernels; None: the dense products there do as well."""
        ...

    def cautions(self) -> list[str]:
        """What someone who uses the result should know about how it was computed."""
        ...

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Memory for a tensor of a step, the same in every step; None: whoever needs it allocates it."""
        ...

    def encode_select(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, rule: Rule = "top") -> tuple[Tensor, Tensor]:
        """The k chosen pre-activations `p = x W_encᵀ + b_enc` of each row: float32 [B, K] and int64 [B, K], in no particular order.

        `top`: the k largest, through a ReLU. `abs`: the k largest by |p|, sign kept. `group`: the largest of each of k contiguous groups of
        F / k latents, through a ReLU.
        """
        ...

    def encode_select_batch(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k·B largest pre-activations of the whole batch, through a ReLU: float32 [B, K'] and int64 [B, K'], K' the count of the fullest row.

        A row's values descend; places that it does not fill hold zeros, at latents of its own that were not chosen.
        """
        ...

    def decode(self, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        """`x̂_b = Σ_j v_bj W_dec[i_bj]`, without a bias: [B, d]."""
        ...

    def value_gradients(self, grad_BD: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        """`∂L/∂v_bj = ⟨∂L/∂x̂_b, W_dec[i_bj]⟩`: [B, K]."""
        ...

    def reconstruct(
        self, target_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of `L = weight · Σ|e|²` with `e = target − x̂`: e (in place of the target), `G = −2 weight e`, `δ_bj = ⟨G_b, W_dec[i_bj]⟩·[v_bj ≠ 0]`,
        and Σ|e|² (0-dimensional). G and δ may lie where the next call puts its own."""
        ...

    def group(self, indices_BK: Tensor, n_latents: int, values_BK: Tensor | None = None) -> Firing:
        """The pairs of a selection, grouped by latent; pairs whose value is 0 may be left out."""
        ...

    def latent_sums(self, firing: Firing, weights_BK: Tensor, source_BD: Tensor) -> Tensor | RowSums:
        """`S_f = Σ_{(b,j): i_bj = f} w_bj source_b`: [F, d], the shape of both weight gradients, without a [B, F] matrix."""
        ...


def pick(device: str, name: str | None = None) -> Kernels:
    """The kernels for `device`, by what the machine can do; `name` asks for the set that a saved state was trained with.

    `SAEHUB_KERNELS` overrules the choice for new trainings. StageFailed for a set that is not there.
    """
    import os
    from importlib.util import find_spec

    from saehub.errors import StageFailed

    processor = device.partition(":")[0]
    compiled = processor == "cpu" and find_spec("numba") is not None
    there = ["cpu", "reference"] if compiled else ["reference"]
    if find_spec("triton") is not None and (processor == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        there.append("gpu")  # last: it is not chosen by itself before it was measured on a GPU
    chosen = name or os.environ.get(CHOICE) or there[0]
    base, _, kind = chosen.partition(":")
    kinds = {"cpu": ("int8", "bfloat16", "float32"), "gpu": ("bfloat16", "library", "float32")}.get(base, ())
    if base not in there or kind not in ("", *kinds):
        whose = "this training was begun with" if name else f"{CHOICE} asks for"
        raise StageFailed(
            f"{whose} the kernels {chosen!r}, which are not there",
            why=f"available on {device}: {', '.join(there)}" + ("" if compiled else " (`cpu` needs the processor as device, and numba)"),
            fix="resume on a machine and saehub version like those that wrote the state, or start the training again"
            if name
            else f"unset {CHOICE}",
        )
    if base == "gpu":
        from saehub_native.kernels.gpu import GpuKernels

        return GpuKernels(kind or None)
    if base == "cpu":
        from saehub_native.kernels.cpu import CpuKernels

        try:
            return CpuKernels(kind or None)
        except ImportError as error:  # numba is there but does not work with this Python or numpy
            if chosen != there[0] or name:
                raise StageFailed(f"the kernels {chosen!r} cannot be loaded", why=str(error), fix="pip install -U numba") from error
    from saehub_native.kernels.reference import ReferenceKernels

    return ReferenceKernels()
