"""Whole sequences in; what is new at each position, beyond what attention predicts from the positions before it, out (arXiv 2511.01836)."""

from __future__ import annotations

import torch
from torch import Tensor

from saehub.checkpoint.config import SAEConfig, number, whole
from saehub.checkpoint.norms import apply_norm, undo_norm
from saehub.checkpoint.sae import SAE, TensorSpec, matmul, pack
from saehub.errors import FormatError, NeedsInput, UsageError

EPS = 1e-6
"""Added to the length of a prediction before dividing by it."""
PROJECTIONS = ("k_ctx", "q_target", "v_ctx", "c_proj")


class Temporal(SAE):
    """The temporal feature analyser of Lubana et al. 2025, as SAELens' `TemporalSAE` computes it. Takes [B, T, d]: not row-wise.

    With c = input_scale, λ = 1/(4 d_in), W_enc = W_decᵀ where `tied`:

        x' = c norm_in(x) - subtract_b_dec b_dec;   r = x'
        for every attention layer:
            z_t = max(λ r_t W_enc, 0);   a_t = causal attention of z_t on (0, z_0 … z_{t-1})
            ẑ = max(a, 0);   D = ẑ W_dec;   s = D·r / (‖D‖ + 1e-6)²
            z_pred += s ẑ;   r -= s D
        f = max(λ r W_enc, 0), the k largest of a position if `k` is given          (the novel codes: what `encode` returns)
        x̂ = norm_out(((f + z_pred) W_dec + b_dec) / c; x)        (b_dec left out where tied and not subtracted)

    `decode(f, like=x)` adds the prediction, which comes from x; `decode_novel(f)` is the part of f alone, SAELens' `decode`.
    Attention: W_dec [d_sae, d_in], b_dec [d_in], `attn_layers.{i}.{k_ctx,q_target}` [d_sae / bottleneck_factor, d_sae], `.{v_ctx,c_proj}`
    [d_sae, d_sae], each with weight and bias.
    """

    row_wise = False
    allows_decoder_norm_scaling = False

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if config.kind != "autoencoder":
            raise FormatError(f"a temporal {config.kind}", why="it predicts its own input")
        heads, factor = whole(config, "n_heads"), whole(config, "bottleneck_factor")
        whole(config, "n_attn_layers", least=0)
        if config.d_sae % (heads * factor):
            raise FormatError(f"temporal: d_sae {config.d_sae} is no multiple of n_heads x bottleneck_factor = {heads * factor}")
        if config.params.get("k") is not None:
            whole(config, "k", most=config.d_sae)
        if not isinstance(config.params.get("tied"), bool):
            raise FormatError("temporal: parameter 'tied' must be true or false")
        if number(config, "input_scale", least=0) == 0 or (config.params["input_scale"] != 1 and config.norm_in != "none"):
            raise FormatError("temporal: input_scale must be positive, and 1 beside a run-time norm")

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        found = super().specs(config)
        names = ("W_dec", "b_dec") if config.params["tied"] else ("W_enc", "W_dec", "b_dec")
        found = {name: found[name] for name in names}
        narrow = config.d_sae // int(config.params["bottleneck_factor"])
        for layer in range(int(config.params["n_attn_layers"])):
            for projection in PROJECTIONS:
                rows = narrow if projection in ("k_ctx", "q_target") else config.d_sae
                found[f"attn_layers.{layer}.{projection}.weight"] = TensorSpec((rows, config.d_sae))
                found[f"attn_layers.{layer}.{projection}.bias"] = TensorSpec((rows,))
        return found

    @property
    def max_active(self) -> int | None:
        k = self.config.params.get("k")
        return None if k is None else int(k)

    @property
    def needs_input_to_decode(self) -> bool:
        return True

    # ------------------------------------------------------------------ encoding
    def encode(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Sequences [B, T, d_in] (or one, [T, d_in]) to the novel codes, dense [..., T, d_sae]."""
        return self.activate(self.preacts(self.centre(self._sequences(x, dtype)))).reshape(*x.shape[:-1], self.config.d_sae)

    def encode_sparse(
        self, x: Tensor, k_max: int | None = None, *, limit_bytes: int = 2**31, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `SAE.encode_sparse`, the rows of all sequences one after the other, a sequence at a time."""
        x_BTD = self._sequences(x, dtype)
        pieces = [pack(self.encode(x_TD, dtype=dtype)) for x_TD in x_BTD]
        width = k_max if k_max is not None else max([self.max_active or 0, *(values.shape[1] for values, _ in pieces)])
        widest = max((values.shape[1] for values, _ in pieces), default=0)
        if widest > width:
            raise UsageError(f"k_max={k_max} is too small: a row has {widest} active latents", fix="raise k_max, or leave it out")
        needed = x_BTD.shape[0] * x_BTD.shape[1] * width * (x_BTD.element_size() + 8)
        if needed > limit_bytes:
            raise UsageError(f"sparse features of {needed / 2**30:.2f} GiB", fix="encode fewer sequences at a time, or raise limit_bytes")
        pad = torch.nn.functional.pad
        if not pieces:
            return x_BTD.new_zeros((0, width)), torch.zeros((0, width), dtype=torch.int64, device=x_BTD.device)
        return (
            torch.cat([pad(values, (0, width - values.shape[1])) for values, _ in pieces]),
            torch.cat([pad(indices, (0, width - indices.shape[1]), value=-1) for _, indices in pieces]),
        )

    def centre(self, x_BTD: Tensor) -> Tensor:
        """x' = c norm_in(x) - subtract_b_dec b_dec."""
        x_BTD = apply_norm(self.config.norm_in, x_BTD) * float(self.config.params["input_scale"])
        return x_BTD - self.b_dec if self.config.subtract_b_dec else x_BTD

    def preacts(self, xp_BTD: Tensor) -> Tensor:
        """λ r W_enc [B, T, d_sae], r the residual after every layer's prediction."""
        return self._project(self.predict(xp_BTD)[0])

    def predict(self, xp_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual r [B, T, d_in] and the predicted codes z_pred [B, T, d_sae] of centred sequences."""
        residual_BTD, predicted_BTF = xp_BTD, xp_BTD.new_zeros((*xp_BTD.shape[:2], self.config.d_sae))
        for layer in range(int(self.config.params["n_attn_layers"])):
            codes_BTF = self._project(residual_BTD).relu()
            guess_BTF = self._attend(layer, codes_BTF).relu()
            guess_BTD = _apply(guess_BTF, self.W_dec)
            length_BT1 = guess_BTD.norm(dim=-1, keepdim=True) + EPS
            scale_BT1 = (guess_BTD * residual_BTD).sum(-1, keepdim=True) / length_BT1.square()
            predicted_BTF = predicted_BTF + scale_BT1 * guess_BTF
            residual_BTD = residual_BTD - scale_BT1 * guess_BTD
        return residual_BTD, predicted_BTF

    def _project(self, residual_BTD: Tensor) -> Tensor:
        W_enc_DF = self.W_dec.T if self.config.params["tied"] else self.W_enc
        return _apply(residual_BTD * (1 / (4 * self.config.d_in)), W_enc_DF)

    def _attend(self, layer: int, codes_BTF: Tensor) -> Tensor:
        """Causal attention of every position on those before it: keys and values are the codes shifted by one, zeros first."""
        B, T, F = codes_BTF.shape
        heads = int(self.config.params["n_heads"])
        before_BTF = torch.cat([torch.zeros_like(codes_BTF[:, :1]), codes_BTF[:, :-1]], dim=1)

        def projected(name: str, x_BTF: Tensor) -> Tensor:
            weight, bias = (getattr(self, f"attn_layers_{layer}_{name}_{part}") for part in ("weight", "bias"))
            return _apply(x_BTF, weight.T) + bias

        def split(x_BTE: Tensor) -> Tensor:
            return x_BTE.view(B, T, heads, -1).transpose(1, 2)

        q_BHTE, k_BHTE = split(projected("q_target", codes_BTF)), split(projected("k_ctx", before_BTF))
        scores_BHTT = q_BHTE @ k_BHTE.transpose(-2, -1) / q_BHTE.shape[-1] ** 0.5
        ahead_TT = torch.ones(T, T, dtype=torch.bool, device=codes_BTF.device).triu(1)
        weights_BHTT = scores_BHTT.masked_fill(ahead_TT, float("-inf")).softmax(-1)
        mixed_BTF = (weights_BHTT @ split(projected("v_ctx", before_BTF))).transpose(1, 2).reshape(B, T, F)
        return projected("c_proj", mixed_BTF)

    def activate(self, p_BTF: Tensor) -> Tensor:
        acts_BTF, k = p_BTF.relu(), self.max_active
        if k is None:
            return acts_BTF
        indices_BTK = acts_BTF.topk(k, dim=-1).indices
        return torch.zeros_like(acts_BTF).scatter(-1, indices_BTK, acts_BTF.gather(-1, indices_BTK))

    def margin(self, p_BTF: Tensor) -> Tensor:
        k = self.max_active
        if k is None or k == self.config.d_sae:
            return p_BTF.abs()
        # A chosen latent leaves where it meets the best one left out (or 0), one left out enters where it meets the last one chosen.
        last_in, first_out = p_BTF.topk(k + 1, dim=-1).values[..., k - 1 :].clamp(min=0).split(1, dim=-1)
        return torch.where(p_BTF >= last_in, p_BTF - first_out, last_in - p_BTF).abs()

    def rounding_scale(self, xp_BTD: Tensor) -> Tensor:
        # Every layer's prediction is as long as the residual at most, and its rounding errors come from the whole sequence.
        length_B11 = xp_BTD.norm(dim=-1, keepdim=True).amax(1, keepdim=True)
        rows_F = torch.linalg.vector_norm(self.W_dec if self.config.params["tied"] else self.W_enc.T, dim=-1, dtype=xp_BTD.dtype)
        steps = 1 + 4 * int(self.config.params["n_attn_layers"])
        return (length_B11 * rows_F * steps / (4 * self.config.d_in)).expand(*xp_BTD.shape[:2], -1)

    # ------------------------------------------------------------------ decoding
    def decode(self, acts: Tensor, like: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Novel codes [..., T, d_sae] and the input they came from to the whole reconstruction [..., T, d_in], prediction included."""
        self._check_codes(acts)
        if like is None:
            raise NeedsInput(
                "decode needs the input sequences here",
                why="the novel codes leave out what attention predicts from them",
                fix="decode(acts, like=x), or call the SAE itself; decode_novel(acts) is the part of the codes alone",
            )
        x_BTD = self._sequences(like, dtype)
        if like.shape[:-1] != acts.shape[:-1]:
            raise UsageError(f"like has shape {list(like.shape)}, the features {list(acts.shape)}")
        codes_BTF = acts.reshape(*x_BTD.shape[:2], -1).to(x_BTD.dtype) + self.predict(self.centre(x_BTD))[1]
        return undo_norm(self.config.norm_out, self._decoded(codes_BTF), x_BTD).reshape(*acts.shape[:-1], self.config.d_in)

    def decode_novel(self, acts: Tensor) -> Tensor:
        """Codes [..., d_sae] to f W_dec + b_dec over c [..., d_in], with no prediction and no run-time norm undone."""
        self._check_codes(acts)
        return self._decoded(acts.to(self.W_dec.dtype))

    def decode_sparse(self, values: Tensor, indices: Tensor, like: Tensor | None = None) -> Tensor:
        """`encode_sparse`'s output and the sequences [B, T, d_in] it came from to the reconstruction [B·T, d_in]."""
        acts_NF = values.new_zeros((values.shape[0], self.config.d_sae)).scatter_add(1, indices.clamp(min=0), values * (indices >= 0))
        return self.decode(acts_NF if like is None else acts_NF.reshape(*like.shape[:-1], -1), like=like).reshape(-1, self.config.d_in)

    def _decoded(self, codes: Tensor) -> Tensor:
        y = _apply(codes, self.W_dec)
        if not self.config.params["tied"] or self.config.subtract_b_dec:
            y = y + self.b_dec
        return y / float(self.config.params["input_scale"])

    def _check_codes(self, acts: Tensor) -> None:
        if acts.shape[-1] != self.config.d_sae:
            raise UsageError(f"decode got features of shape {list(acts.shape)}", why=f"expected d_sae = {self.config.d_sae} last")

    def _sequences(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        if x.ndim not in (2, 3) or x.shape[-1] != self.config.d_in:
            raise UsageError(
                f"the input has shape {list(x.shape)}",
                why=f"a temporal SAE needs whole sequences [B, T, {self.config.d_in}] (row_wise: false): a row's features depend on those before it",
            )
        return (x if x.ndim == 3 else x[None]).to(dtype or self.W_dec.dtype)

    def scale_input(self, s: float, target: float | None = None) -> SAE:
        """The same dictionary for raw rows, given that it was trained on x·s. Softmax is not homogeneous, so s goes into `input_scale`, and
        features stay in the units that it was trained in."""
        if not 0 < s < float("inf") or target not in (None, s):
            raise UsageError(f"scale_input({s}, {target})", why="a scale is a positive number, and an autoencoder's target is its input")
        params = {**self.config.params, "input_scale": float(self.config.params["input_scale"]) * s}
        return type(self)(self.config.replace(params=params), self.tensors(), self.provenance)


def _apply(x_BTD: Tensor, W_DF: Tensor) -> Tensor:
    return matmul(x_BTD.reshape(-1, x_BTD.shape[-1]), W_DF).reshape(*x_BTD.shape[:-1], -1)
