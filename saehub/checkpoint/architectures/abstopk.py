"""Pre-activations in, each row's k largest by absolute value out, signs kept (SAELens `abstopk`)."""

from __future__ import annotations

from torch import Tensor

from saehub.checkpoint.architectures.topk import TopK


class AbsTopK(TopK):
    """f_i = p_i if |p_i| is among the row's k largest, else 0."""

    def ranked(self, p_BF: Tensor) -> Tensor:
        return p_BF.abs()

    def kept(self, p_BK: Tensor) -> Tensor:
        return p_BK
