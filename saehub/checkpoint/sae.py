"""A config and tensors in; a sparse autoencoder, transcoder or skip transcoder that encodes and decodes rows out, without hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.norms import apply_norm, undo_norm
from saehub.errors import FormatError, NeedsInput, UsageError

CHUNK_ELEMENTS = 2**24
"""Dense pre-activations are held for this many elements at a time (64 MiB in float32)."""
CAST_ELEMENTS = 2**22
"""Weights computed with in a wider dtype are cast this many at a time."""
SPARSE_LIMIT_BYTES = 2**31
"""`encode_sparse` refuses to return more than this (2 GiB) unless told otherwise."""


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor must look like."""

    shape: tuple[int | None, ...]
    """None: any length."""
    floating: bool = True
    """Floating point, or else int64."""


class SAE(nn.Module):
    """One trained dictionary (the equation is `SAEConfig`'s; the activation is the subclass').

    Tensors, as stored: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], W_skip [d_out, d_in] for a skip
    transcoder, and what the architecture adds. Rows are cast to the dtype of the weights and computed in it, or in `dtype` where one is
    given: weights are then cast piece by piece, so a float64 replay of a bf16 SAE needs no second copy. Parameters do not require
    gradients; inputs may.

    A subclass gives `activate` and `margin`, and where they differ `specs`, `check`, `preacts`, `max_active`, `rival`, `rounding_scale`,
    `scaled_by_input`.
    """

    row_wise = True
    """Whether a row's features depend on that row alone; one that is not needs [B, T, d]."""
    allows_decoder_norm_scaling = True
    scaled_by_input: tuple[str, ...] = ("b_enc", "b_dec", "threshold")
    """Tensors in units of the input: what `scale_input` divides."""

    def __init__(self, config: SAEConfig, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any] | None = None):
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.check(config)
        if config.decoder_norm_scaling and not self.allows_decoder_norm_scaling:
            raise FormatError(f"decoder_norm_scaling on {config.architecture}", why="its equation has no such scaling")
        specs = self.specs(config)
        _check_tensors(config.architecture, specs, tensors)
        self._names = tuple(specs)
        for name, spec in specs.items():
            tensor = tensors[name].detach().contiguous()
            if spec.floating:
                self.register_parameter(_attribute(name), nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(_attribute(name), tensor)
        self._check_values()

    # ------------------------------------------------------------------ making
    @staticmethod
    def build(config: SAEConfig, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any] | None = None) -> SAE:
        """The SAE of `config.architecture`, over `tensors` (shared, not copied); wrong names, shapes or parameters are a FormatError."""
        from saehub.checkpoint.registry import architecture

        return architecture(config.architecture)(config, tensors, provenance)

    @classmethod
    def specs(cls, config: SAEConfig) -> dict[str, TensorSpec]:
        """The tensors that the architecture stores, in file order."""
        found = {
            "W_enc": TensorSpec((config.d_in, config.d_sae)),
            "b_enc": TensorSpec((config.d_sae,)),
            "W_dec": TensorSpec((config.d_sae, config.d_out)),
            "b_dec": TensorSpec((config.d_out,)),
        }
        if config.skip:
            found["W_skip"] = TensorSpec((config.d_out, config.d_in))
        return found

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        """Raise FormatError on parameters that the architecture cannot have."""

    def _check_values(self) -> None:
        """Raise FormatError on tensors whose values contradict the config."""

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, detached, in file order."""
        return {name: getattr(self, _attribute(name)).detach() for name in self._names}

    def astype(self, dtype: torch.dtype) -> SAE:
        """A copy with every floating tensor in `dtype` (whole-number tensors stay)."""
        cast = {name: t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for name, t in self.tensors().items()}
        return type(self)(self.config, cast, self.provenance)

    # ------------------------------------------------------------------ encoding
    def encode(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [..., d_in] to dense features [..., d_sae], in the dtype of the weights or in `dtype`."""
        return self._encode_rows(self._rows(x, dtype)).reshape(*x.shape[:-1], self.config.d_sae)

    def encode_sparse(
        self, x: Tensor, k_max: int | None = None, *, limit_bytes: int = SPARSE_LIMIT_BYTES, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows [..., d_in], n of them, to values [n, k_max] and latent indices int64 [n, k_max]: ascending, padded with 0 and -1.

        `k_max` defaults to the architecture's k, or else to the greatest number of active latents of a row. A row with more active
        latents than a given `k_max`, and a result beyond `limit_bytes`, are a UsageError. At most `CHUNK_ELEMENTS` pre-activations
        exist at a time.
        """
        x_BD = self._rows(x, dtype)
        rows, width = x_BD.shape[0], k_max if k_max is not None else self.max_active
        step = max(1, CHUNK_ELEMENTS // self.config.d_sae)
        pieces: list[tuple[Tensor, Tensor]] = []
        widest = width or 0
        for start in range(0, rows, step):
            values, indices = self._encode_chunk(x_BD[start : start + step])
            found = values.shape[1]
            if width is not None and found > width:
                if bool((indices[:, width:] >= 0).any()):
                    raise UsageError(
                        f"k_max={width} is too small: a row has {int((indices >= 0).sum(1).max())} active latents",
                        fix="raise k_max, or leave it out",
                    )
                values, indices = values[:, :width], indices[:, :width]
            widest = max(widest, found if width is None else width)
            needed = rows * widest * (values.element_size() + 8)
            if needed > limit_bytes:
                raise UsageError(
                    f"{rows} rows with up to {widest} active latents take {needed / 2**30:.2f} GiB as sparse features",
                    why=f"the limit is {limit_bytes / 2**30:.2f} GiB",
                    fix="encode fewer rows at a time, or raise limit_bytes",
                )
            pieces.append((values, indices))
        if not pieces:
            return x_BD.new_zeros((0, widest)), torch.zeros((0, widest), dtype=torch.int64, device=x_BD.device)
        padded = [(_pad(values, widest, 0), _pad(indices, widest, -1)) for values, indices in pieces]
        return torch.cat([values for values, _ in padded]), torch.cat([indices for _, indices in padded])

    def preacts(self, xp_BD: Tensor) -> Tensor:
        """p = x' W_enc + b_enc, times the decoder norms if the config says so; x' comes from `centre`."""
        p_BF = matmul(xp_BD, self.W_enc) + self.b_enc
        return p_BF * self._decoder_norms(p_BF.dtype) if self.config.decoder_norm_scaling else p_BF

    def centre(self, x_BD: Tensor) -> Tensor:
        """x' = norm_in(x) - subtract_b_dec * b_dec."""
        x_BD = apply_norm(self.config.norm_in, x_BD)
        return x_BD - self.b_dec if self.config.subtract_b_dec else x_BD

    def activate(self, p_BF: Tensor) -> Tensor:
        """Pre-activations [n, d_sae] to dense features [n, d_sae]."""
        raise NotImplementedError(f"{type(self).__name__}.activate")

    def margin(self, p_BF: Tensor) -> Tensor:
        """How far each pre-activation [n, d_sae] is from the value at which its latent enters or leaves the support."""
        raise NotImplementedError(f"{type(self).__name__}.margin")

    def rival(self, p_BF: Tensor) -> Tensor | None:
        """Where latents compete (top-k, group-max): int64 [n, d_sae], the latent that each would trade places with; else None."""
        return None

    def rounding_scale(self, xp_BD: Tensor) -> Tensor:
        """|x'| |W_enc| + |b_enc| [n, d_sae]: what one unit roundoff moves a pre-activation by, in the units of `margin`."""
        scale_BF = matmul(xp_BD.abs(), self.W_enc, absolute=True) + self.b_enc.abs()
        return scale_BF * self._decoder_norms(scale_BF.dtype) if self.config.decoder_norm_scaling else scale_BF

    @property
    def max_active(self) -> int | None:
        """Most latents that a row can have active by construction, or None."""
        return None

    def _encode_rows(self, x_BD: Tensor) -> Tensor:
        return self.activate(self.preacts(self.centre(x_BD)))

    def _encode_chunk(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        return pack(self._encode_rows(x_BD))

    # ------------------------------------------------------------------ decoding
    def decode(self, acts: Tensor, like: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Features [..., d_sae] to the reconstruction [..., d_out]. `like` is the input x [..., d_in]: needed for a run-time output
        norm and for a skip path (else NeedsInput), ignored otherwise."""
        if acts.shape[-1] != self.config.d_sae:
            raise UsageError(
                f"decode got features of shape {list(acts.shape)}", why=f"expected the last dimension to be d_sae = {self.config.d_sae}"
            )
        flat_BF = acts.reshape(-1, self.config.d_sae).to(dtype or self.W_dec.dtype)
        if self.config.decoder_norm_scaling:
            flat_BF = flat_BF * self._inverse_decoder_norms(flat_BF.dtype)
        return self._finish(matmul(flat_BF, self.W_dec), like, acts.shape[:-1], dtype)

    def decode_sparse(self, values: Tensor, indices: Tensor, like: Tensor | None = None) -> Tensor:
        """`encode_sparse`'s output [n, k_max] to the reconstruction [n, d_out]; `like` [n, d_in] as in `decode`."""
        if not indices.numel():  # nothing is active anywhere; embedding_bag refuses empty bags
            return self._finish(self.W_dec.new_zeros((indices.shape[0], self.config.d_out)), like, indices.shape[:-1], None)
        kept = indices >= 0
        rows = indices.clamp(min=0)
        values = torch.where(kept, values, 0).to(self.W_dec.dtype)
        if self.config.decoder_norm_scaling:
            values = values * self._inverse_decoder_norms(values.dtype)[rows]
        y_BD = nn.functional.embedding_bag(rows, self.W_dec, per_sample_weights=values, mode="sum")
        return self._finish(y_BD, like, indices.shape[:-1], None)

    def forward(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """The reconstruction [..., d_out] of rows [..., d_in], norms and skip path included."""
        return self.decode(self.encode(x, dtype=dtype), like=x, dtype=dtype)

    @property
    def needs_input_to_decode(self) -> bool:
        """Whether `decode` must be given `like`."""
        return self.config.norm_out != "none" or self.config.skip

    def _finish(self, y_BD: Tensor, like: Tensor | None, leading: torch.Size, dtype: torch.dtype | None) -> Tensor:
        y_BD = self._add_bias(y_BD)
        if self.needs_input_to_decode:
            if like is None:
                raise NeedsInput(
                    "decode needs the input rows here",
                    why=f"norm_out is {self.config.norm_out!r}" if not self.config.skip else "the skip path adds x W_skipᵀ",
                    fix="decode(acts, like=x), or call the SAE itself for the reconstruction",
                )
            x_BD = self._rows(like, dtype)
            if x_BD.shape[0] != y_BD.shape[0]:
                raise UsageError(f"like has {x_BD.shape[0]} rows, the features {y_BD.shape[0]}")
            y_BD = undo_norm(self.config.norm_out, y_BD, x_BD)
            if self.config.skip:
                y_BD = y_BD + matmul(x_BD if dtype else x_BD.to(self.W_skip.dtype), self.W_skip.T)
        return y_BD.reshape(*leading, self.config.d_out)

    def _add_bias(self, y_BD: Tensor) -> Tensor:
        return y_BD + self.b_dec

    # ------------------------------------------------------------------ units
    def scale_input(self, s: float, target: float | None = None) -> SAE:
        """The same dictionary for raw rows, given that it was trained on x·s (and, a transcoder, on targets y·target; default s).

        Every activation here is positively homogeneous, so biases and thresholds are divided by s and the weights stay; features and
        reconstruction come out in raw units. A target in another scale multiplies W_dec and W_skip by s/target. Multiplications are
        done in float64 and rounded once.
        """
        target = s if target is None else target
        if not (0 < s < float("inf") and 0 < target < float("inf")):
            raise UsageError(f"scale_input({s}, {target})", why="a scale is a positive number")
        if (s, target) == (1.0, 1.0):
            return type(self)(self.config, self.tensors(), self.provenance)
        if self.config.norm_in != "none":
            raise UsageError(f"scale_input on an SAE with norm_in {self.config.norm_in!r}", why="a run-time norm already removes the scale")
        if target != s and self.config.kind == "autoencoder":
            raise UsageError("scale_input with two scales on an autoencoder", why="its target is its input")
        factors = dict.fromkeys(self.scaled_by_input, 1 / s)
        if self.config.kind != "autoencoder":
            factors |= {"b_dec": 1 / target, "W_dec": s / target, "W_skip": s / target}
        tensors = {
            name: (t.double() * factors[name]).to(t.dtype) if factors.get(name, 1.0) != 1.0 else t for name, t in self.tensors().items()
        }
        return type(self)(self._scaled_config(s), tensors, self.provenance)

    def _scaled_config(self, s: float) -> SAEConfig:
        """The config with parameters in units of the input divided by s."""
        return self.config

    # ------------------------------------------------------------------ shared
    def _rows(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """[..., d_in] as [n, d_in] in the dtype of the weights, or in `dtype`."""
        # Not `isinstance(x, Tensor)`: inside a trace of nnsight a proxy stands for a tensor.
        if x is None or isinstance(x, (list, tuple, dict, str, bytes, int, float, np.ndarray)):
            raise UsageError(f"the input is a {type(x).__module__}.{type(x).__name__}, not a tensor", fix="torch.as_tensor(x)")
        if x.shape[-1:] != (self.config.d_in,):
            raise UsageError(f"the input has shape {list(x.shape)}", why=f"expected the last dimension to be d_in = {self.config.d_in}")
        return x.reshape(-1, self.config.d_in).to(dtype or getattr(self, "W_enc", self.W_dec).dtype)

    def _decoder_norms(self, dtype: torch.dtype) -> Tensor:
        """‖W_dec_i‖ [d_sae], in the wider of `dtype` and the decoder's."""
        return torch.linalg.vector_norm(self.W_dec, dim=-1, dtype=torch.promote_types(dtype, self.W_dec.dtype))

    def _inverse_decoder_norms(self, dtype: torch.dtype) -> Tensor:
        norms_F = self._decoder_norms(dtype)  # a zero row never fires (p = 0): its factor is 0, not infinity
        return torch.where(norms_F > 0, 1 / norms_F, torch.zeros_like(norms_F))

    def extra_repr(self) -> str:
        c = self.config
        params = "".join(f", {name}={value}" for name, value in c.params.items())
        return f"{c.architecture} {c.kind}, d_in={c.d_in}, d_sae={c.d_sae}, d_out={c.d_out}{params}"


def _attribute(name: str) -> str:
    """Of a tensor: torch allows no dots."""
    return name.replace(".", "_")


def _check_tensors(architecture: str, specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    missing, extra = [n for n in specs if n not in tensors], [n for n in tensors if n not in specs]
    if missing or extra:
        raise FormatError(
            f"the tensors of a {architecture} SAE do not match",
            why=f"missing: {', '.join(missing) or 'none'}; not expected: {', '.join(extra) or 'none'}",
            fix=f"expected exactly {', '.join(specs)}",
        )
    for name, spec in specs.items():
        tensor = tensors[name]
        if len(tensor.shape) != len(spec.shape) or any(
            want is not None and have != want for have, want in zip(tensor.shape, spec.shape, strict=True)
        ):
            expected = [size if size is not None else "any" for size in spec.shape]
            raise FormatError(f"{name} has shape {list(tensor.shape)}", why=f"expected {expected} for a {architecture} SAE of this size")
        if tensor.is_floating_point() != spec.floating or (not spec.floating and tensor.dtype != torch.int64):
            raise FormatError(f"{name} has dtype {tensor.dtype}", why=f"expected {'floating point' if spec.floating else 'int64'}")


def matmul(x_BD: Tensor, W_DF: Tensor, *, absolute: bool = False) -> Tensor:
    """x W in the wider dtype of the two (x |W| if `absolute`); weights that must be cast are cast a few columns at a time."""
    if x_BD.dtype == W_DF.dtype and not absolute:
        return x_BD @ W_DF
    dtype = torch.promote_types(x_BD.dtype, W_DF.dtype)
    columns = max(1, CAST_ELEMENTS // max(1, W_DF.shape[0]))
    pieces = (W_DF[:, start : start + columns].to(dtype) for start in range(0, W_DF.shape[1], columns))
    return torch.cat([x_BD.to(dtype) @ (piece.abs() if absolute else piece) for piece in pieces], dim=1)


def pack(acts_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Dense features [n, F] to values and indices [n, K], K the most active row's count: ascending, padded with 0 and -1."""
    rows, latents = acts_BF.nonzero(as_tuple=True)  # row-major: latents ascend within a row
    counts_B = (acts_BF != 0).sum(1)
    width = int(counts_B.max()) if acts_BF.shape[0] else 0
    slots = torch.arange(rows.shape[0], device=rows.device) - (counts_B.cumsum(0) - counts_B)[rows]
    values = acts_BF.new_zeros((acts_BF.shape[0], width))
    indices = torch.full((acts_BF.shape[0], width), -1, dtype=torch.int64, device=acts_BF.device)
    indices[rows, slots] = latents
    return values.index_put((rows, slots), acts_BF[rows, latents]), indices


def sort_selection(values_BK: Tensor, indices_BK: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """A selection in any order to ascending indices; zero values leave it and become the padding (0, -1) at the end."""
    keyed, order = torch.where(values_BK != 0, indices_BK, d_sae).sort(dim=1)
    return values_BK.gather(1, order) * (keyed < d_sae), torch.where(keyed < d_sae, keyed, -1)


def _pad(tensor: Tensor, width: int, value: int) -> Tensor:
    return tensor if tensor.shape[1] == width else nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)


def parameter_bytes(sae: SAE) -> int:
    """Bytes of all stored tensors."""
    return sum(prod(t.shape) * t.element_size() for t in sae.tensors().values())
