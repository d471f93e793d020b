"""GroupMax: rows and parameters in; the largest pre-activation of each of k groups of latents out."""

from __future__ import annotations

from typing import ClassVar

from saehub_native.architectures.sparse import Sparse
from saehub_native.kernels import Rule


class GroupMax(Sparse):
    """The latents stand in k contiguous groups of d_sae/k; f_i = max(p_i, 0) if p_i is the largest of its group, else 0.

    The equation is that of EleutherAI's Sparsify (`activation="groupmax"`). AuxK chooses among dead latents without regard to groups.
    """

    rule: ClassVar[Rule] = "group"
