"""AbsTopK: rows and parameters in; the k pre-activations of each row that are largest by absolute value out, signs kept."""

from __future__ import annotations

from typing import ClassVar

from saehub_native.architectures.sparse import Sparse
from saehub_native.kernels import Rule


class AbsTopK(Sparse):
    """f_i = p_i if |p_i| is among the row's k largest, else 0: a latent may act in both directions (SAELens `abstopk`).

    AuxK, too, takes the dead latents' pre-activations by absolute value and keeps their signs.
    """

    rule: ClassVar[Rule] = "abs"
