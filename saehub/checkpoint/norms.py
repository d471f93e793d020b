"""Rows in; normalised rows and the coefficients that undo the norm on an output out: run-time norms without hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-5
"""Added to the standard deviation by `layer_norm` (SAELens and OpenAI's TopK reference use the same number)."""


def apply_norm(norm: str, x_BD: Tensor) -> Tensor:
    """`constant_norm_rescale`: x √d/‖x‖. `layer_norm`: (x - μ)/(σ + 1e-5) with σ over n-1. `none`: x. Same dtype out."""
    if norm == "constant_norm_rescale":
        return x_BD * (x_BD.shape[-1] ** 0.5 / x_BD.norm(dim=-1, keepdim=True))
    if norm == "layer_norm":
        centred_BD = x_BD - x_BD.mean(dim=-1, keepdim=True)
        return centred_BD / (centred_BD.std(dim=-1, keepdim=True) + EPS)
    return x_BD


def undo_norm(norm: str, y_BD: Tensor, x_BD: Tensor) -> Tensor:
    """The way back with the coefficients of x: y ‖x‖/√d, or y σ + μ (no 1e-5 here: SAELens' inverse is not exact, and this is it)."""
    if norm == "constant_norm_rescale":
        return y_BD / (x_BD.shape[-1] ** 0.5 / x_BD.norm(dim=-1, keepdim=True))
    if norm == "layer_norm":
        mean_B1 = x_BD.mean(dim=-1, keepdim=True)
        return y_BD * (x_BD - mean_B1).std(dim=-1, keepdim=True) + mean_B1
    return y_BD
