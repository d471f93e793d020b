"""Rows in, the coefficients of a greedy expansion in decoder rows out: matching pursuit (Mallat & Zhang 1993; SAELens `matching_pursuit`)."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub.checkpoint.config import SAEConfig, number, whole
from saehub.checkpoint.sae import SAE, TensorSpec, matmul
from saehub.errors import FormatError


class MatchingPursuit(SAE):
    """r = x'; repeat: i = argmax r·d_i, v = max(r·d_i, 0), f_i += v, r -= v d_i.

    Parameters: `max_iterations` (null: d_in), `residual_threshold` (a row stops when ‖r‖ is below it; 0: never), and
    `stop_on_duplicate_support` (a row stops when its set of latents did not change). Only W_dec [d_sae, d_in] and b_dec are stored; the
    reconstruction is f W_dec, plus b_dec only where the encoder subtracted it.
    """

    allows_decoder_norm_scaling = False
    scaled_by_input = ("b_dec",)

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        found = super().specs(config)
        return {name: found[name] for name in ("W_dec", "b_dec")}

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        number(config, "residual_threshold", least=0)
        if config.params.get("max_iterations") is not None:
            whole(config, "max_iterations")
        if not isinstance(config.params.get("stop_on_duplicate_support"), bool):
            raise FormatError("matching_pursuit: stop_on_duplicate_support must be true or false")
        if config.kind != "autoencoder":
            raise FormatError(f"a matching_pursuit {config.kind}", why="its encoder is its decoder")

    @property
    def iterations(self) -> int:
        """Most steps of a row."""
        steps = self.config.params.get("max_iterations")
        return self.config.d_in if steps is None else int(steps)

    @property
    def max_active(self) -> int:
        return min(self.iterations, self.config.d_sae)

    def preacts(self, xp_BD: Tensor) -> Tensor:
        return xp_BD  # there are none: `activate` starts from the row itself

    def activate(self, p_BF: Tensor) -> Tensor:
        return self._pursue(p_BF)[0]

    def margin(self, p_BF: Tensor) -> Tensor:
        return self._pursue(p_BF, margins=True)[1][:, None].expand(-1, self.config.d_sae)

    def rounding_scale(self, xp_BD: Tensor) -> Tensor:
        # Each step subtracts a rounded multiple of a row: errors add up over the steps, on the scale of the whole input.
        largest_B1 = matmul(xp_BD.abs(), self.W_dec.T, absolute=True).amax(1, keepdim=True)
        return (largest_B1 * self.iterations).expand(-1, self.config.d_sae)

    def _pursue(self, xp_BD: Tensor, margins: bool = False) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae], and (if asked) each row's smallest distance to another choice or to a stopping rule."""
        threshold = float(self.config.params["residual_threshold"])
        stop_on_same = self.config.params["stop_on_duplicate_support"]
        residual_BD = xp_BD
        acts_BF = xp_BD.new_zeros((xp_BD.shape[0], self.config.d_sae))
        margin_B = xp_BD.new_full((xp_BD.shape[0],), float("inf"))
        support_BF = torch.zeros_like(acts_BF, dtype=torch.bool)
        done_B = torch.zeros_like(margin_B, dtype=torch.bool)
        for _ in range(self.iterations):
            with torch.no_grad():
                correlation_BF = matmul(residual_BD, self.W_dec.T).relu()
                best_B1 = correlation_BF.max(dim=1, keepdim=True).indices
                if margins:
                    top_B2 = correlation_BF.topk(min(2, self.config.d_sae), dim=1).values
                    gap_B = top_B2[:, 0] - top_B2[:, 1] if top_B2.shape[1] == 2 else top_B2[:, 0]
                    margin_B = torch.where(done_B, margin_B, torch.minimum(margin_B, gap_B))
            rows_BD = self.W_dec[best_B1.squeeze(1)].to(residual_BD.dtype)
            value_B1 = (residual_BD * rows_BD).sum(-1, keepdim=True).relu() * ~done_B[:, None]
            acts_BF = acts_BF.scatter_add(1, best_B1, value_B1)
            residual_BD = residual_BD - value_B1 * rows_BD
            with torch.no_grad():
                was_done_B = done_B
                if stop_on_same:
                    now_BF = acts_BF != 0
                    done_B = done_B | (now_BF == support_BF).all(1)
                    support_BF = now_BF
                if threshold > 0:
                    length_B = residual_BD.norm(dim=-1)
                    done_B = done_B | (length_B < threshold)
                    if margins:
                        margin_B = torch.where(was_done_B, margin_B, torch.minimum(margin_B, (length_B - threshold).abs()))
                if bool(done_B.all()):
                    break
        return acts_BF, margin_B

    def _add_bias(self, y_BD: Tensor) -> Tensor:
        return y_BD + self.b_dec if self.config.subtract_b_dec else y_BD

    def _scaled_config(self, s: float) -> SAEConfig:
        return self.config.replace(params={**self.config.params, "residual_threshold": float(self.config.params["residual_threshold"]) / s})
