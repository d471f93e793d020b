"""What every codec of another library's folder needs: careful reading, folds between conventions, and a side channel that is believed only if it fits."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError, SaehubError

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.api import ModelShape
    from saehub.checkpoint.sae import SAE

SIDE_CHANNEL = "saehub"
"""Under this key stands what the library has no word for, where it keeps or ignores unknown words."""
MAX_CONFIG_BYTES = 64 * 2**20
"""No config is that long."""
RESTORE = "restore the folder from where it came"
UNIT = 1e-3
"""Decoder rows this near to length 1 count as normalised."""


class Unsayable(Exception):
    """Why a format cannot express an SAE."""


@dataclass
class Foreign:
    """Another library's folder in memory."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    beside: Any = None
    """The side channel."""
    folded: list[str] = field(default_factory=list)
    """What was folded into other tensors, or widened."""
    dropped: list[str] = field(default_factory=list)
    """What the format cannot carry, not even beside."""
    side_channel: list[str] = field(default_factory=list)
    """What only the side channel carries."""
    bit_exact: list[str] = field(default_factory=list)
    """Our tensors that come back bit for bit."""

    def notes(self) -> dict[str, list[str]]:
        """What an exporter's `write` returns."""
        return {"folded": self.folded, "dropped": self.dropped, "side_channel": self.side_channel, "bit_exact": self.bit_exact}


# ---------------------------------------------------------------------- reading
def read_config(file: Path) -> dict[str, Any]:
    """A JSON map; FormatError for anything else, however it is broken."""
    from saehub.jsonio import read_json

    if file.is_file() and file.stat().st_size > MAX_CONFIG_BYTES:
        raise FormatError(f"{file} has {file.stat().st_size} bytes", why="no config is that long", fix=RESTORE)
    try:
        config = read_json(file)
    except RecursionError as error:
        raise FormatError(f"{file} is nested too deeply", fix=RESTORE) from error
    if not isinstance(config, dict):
        raise FormatError(f"{file} is a {type(config).__name__}", why="expected a map", fix=RESTORE)
    return config


def is_map_with(file: Path, keys: set[str]) -> bool:
    """Whether `file` is a JSON map with these keys; never raises: what `sniff` asks."""
    try:
        found = read_config(file) if file.is_file() else {}
    except (SaehubError, OSError, ValueError):
        return False
    return keys <= found.keys()


def check_shapes(
    file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()
) -> None:
    """FormatError unless exactly the `expected` tensors are there (`optional` ones may be absent), in these shapes, finite numbers all."""
    from saehub.checkpoint.stream import count_bad

    missing = [name for name in expected if name not in tensors and name not in optional]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        raise FormatError(
            f"{file} does not hold the tensors of its config",
            why=f"missing: {', '.join(missing) or 'none'}; not expected: {', '.join(map(str, extra)) or 'none'}",
            fix=f"expected exactly {', '.join(expected)}",
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(expected[name]):
            turned = tuple(tensor.shape) == tuple(reversed(expected[name]))
            raise FormatError(
                f"{file}: {name} has shape {list(tensor.shape)}" + (", transposed" if turned else ""),
                why=f"expected {list(expected[name])}",
                fix=RESTORE,
            )
        bad = count_bad(tensor, allow_infinite=name == "threshold")
        if bad:
            raise FormatError(f"{file}: {name} holds {bad} values that are NaN or infinite", fix=RESTORE)


def unit_rows(W_dec_FD: Tensor) -> bool:
    """Whether all decoder rows have length 1, up to UNIT."""
    import torch

    lengths_F = torch.linalg.vector_norm(W_dec_FD, dim=1, dtype=torch.promote_types(W_dec_FD.dtype, torch.float32))
    return bool(((lengths_F - 1).abs() < UNIT).all())


def whole_number(config: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 1) -> int:
    """`config[key]`, a whole number; FormatError that names it."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise FormatError(f"{where}: {key} is {value!r}", why=f"expected a whole number from {least}")
    return value


def folds_of(codec: Any, path: Path, config: Mapping[str, Any]) -> list[str]:
    """What a codec's `read` folds in this folder, of which `config` is the config: `origin.folded`, if that origin is this folder."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were issued when the folder was read
        origin = codec.read(path).provenance.get("origin")
    here = isinstance(origin, dict) and origin.get("config") == config  # else the side channel spoke, of where the SAE once came from
    return list(origin.get("folded") or []) if here else []


# ---------------------------------------------------------------------- folding
def fold_decoder_norms(foreign: Foreign) -> None:
    """decoder_norm_scaling into the weights, with n_i = ‖W_dec_i‖:  W_enc n, b_enc n, W_dec / n.

    Thresholds stay: they are compared with n p. Products are taken in float64 and rounded once, to float32 at least: the rounding of a
    16-bit product would change which latents fire.
    """
    import torch

    tensors = foreign.tensors
    norm_F = tensors["W_dec"].double().norm(dim=1)
    inverse_F = torch.where(norm_F > 0, 1 / norm_F, torch.zeros_like(norm_F))
    for name, factor in (("W_enc", norm_F), ("b_enc", norm_F), ("W_dec", inverse_F[:, None])):
        tensors[name] = (tensors[name].double() * factor).to(torch.promote_types(tensors[name].dtype, torch.float32))
    foreign.folded.append("decoder norms into W_enc, b_enc and W_dec")


def fold_b_dec(foreign: Foreign, *, subtract: bool) -> None:
    """Change whether the encoder subtracts b_dec:  x W + b = (x - b_dec) W + (b + b_dec W).

    `subtract=True`: from an encoder that does not to one that does, b_enc + b_dec W_enc; False: the way back, b_enc - b_dec W_enc. A gated
    encoder adds it to b_gate and, times e^{r_mag}, to b_mag. Sums are taken in float64 and rounded once, to float32 at least.
    """
    import torch

    from saehub.checkpoint.sae import matmul

    tensors = foreign.tensors
    shift_F = matmul(tensors["b_dec"].double()[None], tensors["W_enc"])[0] * (1 if subtract else -1)
    if "b_gate" in tensors:
        shifts = {"b_gate": shift_F, "b_mag": shift_F * tensors["r_mag"].double().exp()}
    else:
        shifts = {"b_enc": shift_F}
    for name, shift in shifts.items():
        tensors[name] = (tensors[name].double() + shift).to(torch.promote_types(tensors[name].dtype, torch.float32))
    foreign.folded.append(
        f"b_dec W_enc into {' and '.join(shifts)} (the encoder {'subtracts' if subtract else 'does not subtract'} b_dec there)"
    )


# ---------------------------------------------------------------------- side channel
def to_plain(tensor: Tensor) -> dict[str, Any]:
    """A small tensor of any dtype as JSON, bit for bit."""
    import torch

    raw = bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "base64": base64.b64encode(raw).decode()}


def from_plain(entry: Mapping[str, Any]) -> Tensor:
    """The tensor that `to_plain` wrote; KeyError, TypeError, ValueError or RuntimeError for anything else."""
    import torch

    raw = bytearray(base64.b64decode(entry["base64"], validate=True))
    return torch.frombuffer(raw, dtype=_dtype(entry["dtype"])).reshape(entry["shape"]).clone()


def _dtype(word: Any) -> Any:
    import torch

    known = {
        str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    }
    return known[word]


def beside(sae: SAE, standing: Any, *, tensors: tuple[str, ...] = (), dtypes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The side channel of a folder in which `standing` (an SAEConfig) stands: what was folded cannot be taken out again, the rest can.

    `tensors` names those of `sae` that the format has no place for (or only an expanded one), `dtypes` those that were widened.
    """
    stored = sae.tensors()
    return {
        "config": standing.to_json(),
        "provenance": sae.provenance,
        "tensors": {name: to_plain(stored[name]) for name in tensors if name in stored},
        "dtypes": dict(dtypes or {}),
    }


def restore(foreign: Foreign, plain: SAE, write: Callable[[SAE], Foreign]) -> SAE | None:
    """The SAE that the side channel describes, if writing it again gives this very folder; None if there is none, or the folder was edited.

    `plain` is the SAE as the folder says it openly.
    """
    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.registry import architecture
    from saehub.checkpoint.sae import SAE

    found = foreign.beside
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict) or not isinstance(found.get("provenance"), dict):
        return None
    try:
        config = SAEConfig.from_json(found["config"])
        tensors = plain.tensors() | {name: from_plain(entry) for name, entry in dict(found.get("tensors") or {}).items()}
        tensors |= {name: tensors[name].to(_dtype(word)) for name, word in dict(found.get("dtypes") or {}).items()}
        restored = SAE.build(config, {name: tensors[name] for name in architecture(config.architecture).specs(config)}, found["provenance"])
        again = write(restored)
    except (SaehubError, Unsayable, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        return None
    return restored if _same(again, foreign) else None


def _same(again: Foreign, foreign: Foreign) -> bool:
    """Equal in tensors, and in the config but for the side channel itself."""
    from saehub.checkpoint.stream import equal

    ours, theirs = ({key: value for key, value in side.config.items() if key != SIDE_CHANNEL} for side in (again, foreign))
    if ours != theirs or again.tensors.keys() != foreign.tensors.keys():
        return False
    pairs = [(again.tensors[name], foreign.tensors[name]) for name in again.tensors]
    return all(equal(a, b) for a, b in pairs)


def local_shape(model: Mapping[str, Any]) -> ModelShape | None:
    """Sizes of a model (`{"name": …, "revision": …}`) whose config.json is on this machine; never from the network."""
    from saehub.data.model import local_files, shape_of
    from saehub.jsonio import read_json

    try:
        folder = local_files(model["name"], model.get("revision")) if model.get("name") else None
        return shape_of(read_json(folder / "config.json")) if folder else None
    except (SaehubError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
