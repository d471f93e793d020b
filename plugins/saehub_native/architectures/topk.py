"""TopK: rows and parameters in; the k largest pre-activations of each row out."""

from __future__ import annotations

from saehub_native.architectures.sparse import Sparse


class TopK(Sparse):
    """f = relu(topk_k(p)),  p = x' W_encᵀ + b_enc,  x̂ = f W_dec + b_dec   (Gao et al. 2024, arXiv 2406.04093)."""
