"""The words of a checkpoint's header in; a checked, torch-free description of one sparse autoencoder out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from saehub.errors import FormatError, did_you_mean

KINDS = ("autoencoder", "transcoder", "skip_transcoder")
NORMS = ("none", "constant_norm_rescale", "layer_norm")
MAX_WIDTH = 2**31 - 1
"""Widths above this are a broken file, not an SAE."""


@dataclass(frozen=True)
class SAEConfig:
    """Everything that the equation needs besides the tensors.

    x' = norm_in(x) - subtract_b_dec * b_dec
    p  = x' W_enc + b_enc                        (* ‖W_dec_i‖ if decoder_norm_scaling)
    f  = activation(p)                           by architecture
    x̂  = norm_out(f W_dec + b_dec; x) + x W_skipᵀ   (f / ‖W_dec_i‖ if decoder_norm_scaling)
    """

    architecture: str
    """Such as `topk`: built in, or registered by a plugin."""
    d_in: int
    """Width of the input site."""
    d_sae: int
    """Number of latents."""
    d_out: int = 0
    """Width of the output site; 0 means d_in."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the architecture, such as `{"k": 32}`."""
    kind: str = "autoencoder"
    """`autoencoder`, `transcoder` (another site is predicted) or `skip_transcoder` (plus a linear path x W_skipᵀ)."""
    norm_in: str = "none"
    """`none`; `constant_norm_rescale`: x √d_in/‖x‖; `layer_norm`: (x - μ)/(σ + 1e-5), σ with n-1 (SAELens' definitions)."""
    norm_out: str = "none"
    """`none`, or the same word as `norm_in`: its inverse with the coefficients of x."""
    subtract_b_dec: bool = True
    """Whether the encoder sees x - b_dec; a transcoder's must not, its b_dec lives at the output site."""
    decoder_norm_scaling: bool = False
    """Whether pre-activations are multiplied by the decoder rows' norms and activations divided by them again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "d_out", self.d_out or self.d_in)
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        for name in ("d_in", "d_sae", "d_out"):
            width = getattr(self, name)
            if isinstance(width, bool) or not isinstance(width, int) or not 0 < width <= MAX_WIDTH:
                raise FormatError(f"{name} is {width!r}", why="expected a positive whole number")
        for name in ("subtract_b_dec", "decoder_norm_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise FormatError(f"{name} is {getattr(self, name)!r}", why="expected true or false")
        for name, known in (("kind", KINDS), ("norm_in", NORMS), ("norm_out", NORMS)):
            word = getattr(self, name)
            if word not in known:
                raise FormatError(f"{name} is {word!r}{did_you_mean(str(word), known)}", why=f"expected one of {', '.join(known)}")
        if not isinstance(self.architecture, str) or not self.architecture:
            raise FormatError(f"architecture is {self.architecture!r}", why="expected a word such as 'topk'")
        self._check_together()

    def _check_together(self) -> None:
        if self.kind == "autoencoder" and self.d_out != self.d_in:
            raise FormatError(f"an autoencoder with d_in {self.d_in} and d_out {self.d_out}", fix="kind='transcoder', or equal widths")
        if self.kind != "autoencoder" and self.subtract_b_dec:
            raise FormatError(
                f"a {self.kind} that subtracts b_dec from its input",
                why="b_dec lives at the output site",
                fix="subtract_b_dec=False (fold it first: b_enc -= b_dec W_enc)",
            )
        if self.norm_out not in ("none", self.norm_in):
            raise FormatError(f"norm_out {self.norm_out!r} with norm_in {self.norm_in!r}", fix="norm_out must be 'none' or equal norm_in")
        if self.norm_out != "none" and self.kind != "autoencoder":
            raise FormatError(
                f"norm_out {self.norm_out!r} on a {self.kind}", why="the input's norm says nothing of the output's", fix="norm_out='none'"
            )

    @property
    def skip(self) -> bool:
        """Whether there is a linear path around the latents."""
        return self.kind == "skip_transcoder"

    def replace(self, **changes: Any) -> SAEConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain data, in the order of the fields."""
        return {
            name: dict(value) if name == "params" else value for name, value in ((n, getattr(self, n)) for n in self.__dataclass_fields__)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SAEConfig:
        """From a header; other keys are ignored, missing ones and wrong types are a FormatError."""
        values = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        for name in ("architecture", "d_in", "d_sae"):
            if name not in values:
                raise FormatError(f"{name!r} is missing", why=f"present: {', '.join(sorted(map(str, data)))[:300]}")
        if not isinstance(values.get("params", {}), Mapping):
            raise FormatError(f"params is {values['params']!r}", why='expected a map such as {"k": 32}')
        return cls(**values)

    def __reduce__(self) -> tuple:  # a mappingproxy cannot be pickled or deep-copied
        return (_rebuild, (self.to_json(),))

    def __hash__(self) -> int:
        return hash((self.architecture, self.d_in, self.d_sae, self.d_out, self.kind))


def _rebuild(data: dict[str, Any]) -> SAEConfig:
    return SAEConfig(**data)


def whole(config: SAEConfig, name: str, *, least: int = 1, most: int | None = None) -> int:
    """A parameter that must be a whole number (`32` or `32.0`) within bounds."""
    value = config.params.get(name)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 2**53 and int(value) == value
    if not good or value < least or (most is not None and value > most):
        bounds = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
        raise FormatError(f"{config.architecture}: parameter {name!r} is {value!r}", why=f"expected {bounds}")
    return int(value)


def number(config: SAEConfig, name: str, *, least: float = float("-inf")) -> float:
    """A parameter that must be a finite number, at least `least`."""
    value = config.params.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf") or value < least:
        raise FormatError(f"{config.architecture}: parameter {name!r} is {value!r}", why=f"expected a finite number, at least {least}")
    return float(value)
