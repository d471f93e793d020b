"""An SAE and its probe in, a checkpoint folder of format v1 out, and back: read strictly, so that a damaged folder says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.config import SAEConfig
from saehub.errors import FormatError, UsageError
from saehub.jsonio import hash_json, sha256_file, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.probe import Probe
    from saehub.checkpoint.sae import SAE

FORMAT = "saehub"
FORMAT_VERSION = 1
HEADER, WEIGHTS, PROBE = "saehub.json", "sae.safetensors", "probe.safetensors"
MAX_HEADER_BYTES = 64 * 2**20
"""A larger saehub.json is not one."""
RESTORE = "restore the folder from where it came (a partial copy is the usual cause), then: saehub verify PATH"


# ---------------------------------------------------------------------- writing
def save(sae: SAE, path: str | Path, *, probe: Probe | None = None, overwrite: bool = False, **provenance: Any) -> Path:
    """Write `saehub.json`, `sae.safetensors` and, given a probe, `probe.safetensors` into the folder `path`; saehub.json comes last.

    Tensors keep their dtypes. `provenance` (site, model, data …) is added to `sae.provenance`. An existing checkpoint there is a
    UsageError unless `overwrite`, as is provenance of wrong types; a tensor with NaN or infinity is a FormatError (an infinite threshold is allowed: it switches off).
    """
    from saehub import __version__
    from saehub.checkpoint.registry import provider
    from saehub.checkpoint.stream import tensor_hash

    path = Path(path)
    if (path / HEADER).exists() and not overwrite:
        raise UsageError(f"{path} already holds a checkpoint", fix="choose another folder, or save(..., overwrite=True)")
    tensors = sae.tensors()
    for name, tensor in tensors.items():
        _check_finite(name, tensor, f"cannot save to {path}")
    about = _plain({"config": sae.config.to_json(), "provenance": {**sae.provenance, **provenance}})
    if reason := _wrong_provenance(about["provenance"]):
        raise UsageError(f"cannot save to {path}: {reason}", fix="saehub.save(sae, path, site=\"resid_post.6\")")
    path.mkdir(parents=True, exist_ok=True)
    (path / HEADER).unlink(missing_ok=True)  # from here on the folder is incomplete, until the header is back
    entries = {name: {"dtype": _dtype(t), "shape": list(t.shape), "sha256": tensor_hash(t)} for name, t in tensors.items()}
    write_tensors(path / WEIGHTS, tensors)
    (path / PROBE).unlink(missing_ok=True)
    header: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **about["config"],
        "architecture_provider": provider(sae.config.architecture),
        "row_wise": sae.row_wise,
        "tensors": entries,
        "tensors_hash": tensors_hash(entries),
        "probe": None,
        "provenance": about["provenance"],
        "saehub_version": __version__,
    }
    if probe is not None:
        write_tensors(path / PROBE, probe.to_tensors())
        header["probe"] = {"sha256": sha256_file(path / PROBE), "rows": probe.rows, "tokens": probe.token_ids_N is not None}
    write_json_atomic(path / HEADER, {**header, "hash": header_hash(header)})
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file (with words in its header, if any), written beside and renamed, so that it is whole or absent."""
    from saehub.checkpoint.stream import write_safetensors

    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_safetensors(beside, tensors, metadata)
        with open(beside, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def tensors_hash(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over the tensors' names and hashes: the identity of a dictionary, whatever its header says."""
    return hash_json({name: entry["sha256"] for name, entry in entries.items()})


def header_hash(header: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but `hash` itself."""
    return hash_json({key: value for key, value in header.items() if key != "hash"})


def sae_hash(sae: SAE) -> str:
    """`tensors_hash` of an SAE in memory."""
    from saehub.checkpoint.stream import tensor_hash

    return tensors_hash({name: {"sha256": tensor_hash(tensor)} for name, tensor in sae.tensors().items()})


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back (paths as text, tuples as lists); a UsageError for what JSON cannot hold, before anything is written."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{value!r} is a {type(value).__name__}")

    try:
        return json.loads(json.dumps(data, allow_nan=False, default=convert))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            "parameters and provenance of an SAE must be plain data", why=str(error), fix="numbers, text, lists and maps; no NaN"
        ) from error


# ---------------------------------------------------------------------- reading
def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder with a saehub.json; reads nothing."""
    return (Path(path) / HEADER).is_file()


def read_header(path: str | Path) -> dict[str, Any]:
    """The checked content of `path/saehub.json`: version, own hash, types; a FormatError names what is wrong."""
    file = Path(path) / HEADER
    if not file.is_file():
        hint = " (a half-written checkpoint: saehub.json is written last)" if (Path(path) / WEIGHTS).exists() else ""
        raise FormatError(f"{file} does not exist{hint}", fix="name a checkpoint folder" if not hint else RESTORE)
    size = file.stat().st_size
    if size > MAX_HEADER_BYTES:
        raise FormatError(f"{file} has {size} bytes", why=f"expected at most {MAX_HEADER_BYTES}", fix=RESTORE)
    try:
        header = json.loads(file.read_bytes().decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not JSON in UTF-8", why=f"{type(error).__name__}: {error}", fix=RESTORE) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise FormatError(
            f"{file} is not a saehub header", why=f'expected "format": "{FORMAT}", found {found!r}', fix="saehub inspect PATH"
        )
    version = header.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatError(f"{file}: format_version is {version!r}", why="expected a whole number from 1", fix=RESTORE)
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{file}: format_version is {version}", why=f"this saehub reads versions up to {FORMAT_VERSION}", fix="pip install -U saehub"
        )
    if header.get("hash") != header_hash(header):
        raise FormatError(
            f"{file} was changed after it was written",
            why=f"it says its hash is {str(header.get('hash'))[:16]}…, its content gives {header_hash(header)[:16]}…",
            fix=RESTORE,
        )
    _check_entries(file, header)
    return header


def read_config(path: str | Path, header: Mapping[str, Any]) -> SAEConfig:
    """The SAEConfig of a header, errors naming its file."""
    try:
        return SAEConfig.from_json(header)
    except FormatError as error:
        raise _in_file(error, Path(path) / HEADER) from error


def load(path: str | Path, *, check_hashes: bool = True, device: str = "cpu") -> SAE:
    """The SAE in the folder `path` (format v1). Names, shapes, dtypes and lengths are always checked against the header, contents
    against their SHA-256 (and for NaN) unless `check_hashes=False`; anything else than the saved SAE is a FormatError."""
    from saehub.checkpoint.registry import architecture
    from saehub.checkpoint.stream import tensor_hash

    path = Path(path)
    header = read_header(path)
    config = read_config(path, header)
    try:
        cls = architecture(config.architecture, header.get("architecture_provider"))
    except FormatError as error:
        raise _in_file(error, path) from error
    tensors = read_tensors(path / WEIGHTS, header["tensors"])
    if check_hashes:
        for name, tensor in tensors.items():
            found = tensor_hash(tensor)
            if found != header["tensors"][name]["sha256"]:
                raise FormatError(
                    f"{path / WEIGHTS}: {name} is not the tensor that was saved",
                    why=f"SHA-256 {header['tensors'][name]['sha256'][:16]}… in {HEADER}, {found[:16]}… in the file",
                    fix=RESTORE,
                )
            _check_finite(name, tensor, str(path / WEIGHTS))
    try:
        sae = cls(config, {name: t.to(device) for name, t in tensors.items()}, header.get("provenance") or {})
    except FormatError as error:
        raise _in_file(error, path) from error
    return sae


def read_tensors(file: Path, expected: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file; given `expected` {name: {dtype, shape}}, exactly those (compared before any is read)."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FormatError(f"{file} does not exist", fix=RESTORE)
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            if expected is not None:
                _compare(file, {name: stream.get_slice(name) for name in stream.keys()}, expected)  # noqa: SIM118
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise FormatError(
            f"{file} cannot be read", why=f"{file.stat().st_size} bytes; {type(error).__name__}: {error}", fix=RESTORE
        ) from error


def damage(path: str | Path, header: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files beside a header as far as their own headers and lengths say (no tensor is read); empty if nothing."""
    from safetensors import SafetensorError, safe_open

    path, found = Path(path), []
    for name, expected in ((WEIGHTS, header["tensors"]), (PROBE, None)) if header["probe"] else ((WEIGHTS, header["tensors"]),):
        file = path / name
        try:
            if not file.is_file():
                raise FormatError(f"{file} does not exist")
            with safe_open(file, framework="pt", device="cpu") as stream:
                if expected is not None:
                    _compare(file, {tensor: stream.get_slice(tensor) for tensor in stream.keys()}, expected)  # noqa: SIM118
        except FormatError as error:
            found.append(error.what + (f" ({error.why})" if error.why else ""))
        except (SafetensorError, OSError, ValueError) as error:
            found.append(f"{file} is cut short or damaged ({file.stat().st_size} bytes; {type(error).__name__}: {error})")
    return found


def _compare(file: Path, slices: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> None:
    missing, extra = [n for n in expected if n not in slices], [n for n in slices if n not in expected]
    if missing or extra:
        raise FormatError(
            f"{file} does not hold the tensors that {HEADER} lists",
            why=f"missing: {', '.join(missing) or 'none'}; not listed: {', '.join(extra) or 'none'}",
            fix=RESTORE,
        )
    for name, entry in expected.items():
        shape, dtype = slices[name].get_shape(), DTYPES.get(slices[name].get_dtype(), slices[name].get_dtype())
        if list(shape) != list(entry["shape"]) or dtype != entry["dtype"]:
            raise FormatError(
                f"{file}: {name} does not match {HEADER}",
                why=f"expected {entry['dtype']} {entry['shape']}, found {dtype} {list(shape)}",
                fix=RESTORE,
            )


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' words for dtypes, and torch's."""


def _check_entries(file: Path, header: Mapping[str, Any]) -> None:
    """The shape of the header itself: what the rest of the reader relies on."""
    entries = header.get("tensors")
    if not isinstance(entries, dict) or not entries:
        raise FormatError(
            f"{file}: 'tensors' is {type(entries).__name__}", why="expected a map of name to dtype, shape and sha256", fix=RESTORE
        )
    for name, entry in entries.items():
        good = (
            isinstance(entry, dict)
            and entry.get("dtype") in DTYPES.values()
            and isinstance(entry.get("sha256"), str)
            and isinstance(entry.get("shape"), list)
            and all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in entry["shape"])
        )
        if not good:
            raise FormatError(
                f"{file}: the entry of tensor {name!r} is {str(entry)[:200]}", why="expected dtype, shape and sha256", fix=RESTORE
            )
    if header.get("tensors_hash") != tensors_hash(entries):
        raise FormatError(f"{file}: tensors_hash does not follow from the tensors' hashes", fix=RESTORE)
    probe = header.get("probe")
    if "probe" not in header or probe is not None and not (isinstance(probe, dict) and isinstance(probe.get("sha256"), str) and isinstance(probe.get("rows"), int)):
        raise FormatError(f"{file}: 'probe' is {str(probe)[:200] if 'probe' in header else 'missing'}", why="expected null, or sha256 and rows", fix=RESTORE)
    provenance = header.get("provenance", {})
    if not isinstance(provenance, dict):
        raise FormatError(f"{file}: 'provenance' is not a map", fix=RESTORE)
    if reason := _wrong_provenance(provenance):
        raise FormatError(f"{file}: {reason}", fix=RESTORE)


def _wrong_provenance(provenance: Mapping[str, Any]) -> str | None:
    """What the readers of a provenance could not work with, in words: the types of what they look up."""
    known = [(name, provenance.get(name), str) for name in ("site", "target_site")]
    known += [(name, provenance.get(name), dict) for name in ("model", "tokens", "data", "trainer", "origin")]
    if isinstance(provenance.get("model"), dict):
        known.append(("model.name", provenance["model"].get("name"), str))
    for name, value, kind in known:
        if value is not None and not isinstance(value, kind):
            return f"provenance.{name} is {str(value)[:200]!r}, expected {'a string' if kind is str else 'a map'}, or null"
    return None


def _check_finite(name: str, tensor: Tensor, where: str) -> None:
    from saehub.checkpoint.stream import count_bad

    count = count_bad(tensor, allow_infinite=name == "threshold")
    if count:
        raise FormatError(
            f"{name} holds {count} values that are NaN or infinite", where=where, fix="train or convert again: such an SAE computes nothing"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _in_file(error: FormatError, file: Path) -> FormatError:
    return FormatError(f"{file}: {error.what}", where=error.where, why=error.why, fix=error.fix or RESTORE)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(key for key, _ in pairs)[:200]}")
    return found
