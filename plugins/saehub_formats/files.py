"""Weight files of strangers in; plain tensors out, after every length and name was checked, and without running a line of their code."""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE
from saehub.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

MAX_EXPANSION = 100
"""An archive that unpacks to more than this many times its size is a bomb: weights hardly compress."""
MAX_TEXT_BYTES = 2**20
"""Of a config.yaml or a card; published ones have a few KiB."""
MAX_NAMES_BYTES = 2**22
"""Of what `sniff` looks at: the directory of a safetensors file, the pickle of a torch file."""


# ---------------------------------------------------------------------- which file
def one_file(path: Path, pattern: str, what: str) -> Path:
    """`path` itself if it is a file, else the one file in it that matches; several or none are a FormatError that lists them."""
    if path.is_file():
        return path
    found = sorted(path.glob(pattern)) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise FormatError(f"{path} holds no {pattern}", why=f"{what} has its weights there", fix=RESTORE)
    shown = ", ".join(str(file) for file in found[:3])
    raise FormatError(
        f"{path} holds {len(found)} SAEs",
        why="one is read at a time",
        fix=f"name one of its files: {shown}{' …' if len(found) > 3 else ''}",
    )


def first_file(path: Path, pattern: str) -> Path | None:
    """What `sniff` looks at: `path` if it is a matching file, else the first in it; never raises."""
    try:
        if path.is_file():
            return path if path.match(pattern) else None
        return min(path.glob(pattern), default=None) if path.is_dir() else None
    except OSError:
        return None


# ---------------------------------------------------------------------- zip archives
@contextmanager
def open_zip(file: Path, *, stored: bool = False) -> Iterator[zipfile.ZipFile]:
    """The archive, its directory checked: no bombs, no repeated or wandering names, with `stored` no compression at all."""
    if not file.is_file():
        raise FormatError(f"{file} does not exist", fix=RESTORE)
    try:
        with zipfile.ZipFile(file) as archive:
            entries, size = archive.infolist(), file.stat().st_size
            names = [entry.filename for entry in entries]
            if len(set(names)) != len(names):
                raise FormatError(f"{file}: a name occurs twice in the archive", fix=RESTORE)
            for name in names:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise FormatError(f"{file}: the archive names {name!r}", why="that lies outside it", fix=RESTORE)
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > MAX_EXPANSION * size or (
                stored and any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries)
            ):
                raise FormatError(
                    f"{file}: {size} bytes unpack to {unpacked}",
                    why="weights do not compress like that",
                    fix="do not use it; get the file from its publisher",
                )
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, NotImplementedError, RuntimeError, _zlib_error()) as error:
        raise FormatError(
            f"{file} is not a whole zip archive", why=f"{file.stat().st_size} bytes; {type(error).__name__}: {error}", fix=RESTORE
        ) from error


def _zlib_error() -> type[Exception]:
    import zlib

    return zlib.error


def npz_names(file: Path) -> set[str]:
    """Names of the arrays of an .npz file; empty for anything that is not one; never raises."""
    try:
        with open_zip(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (FormatError, ValueError):
        return set()


def read_npz(file: Path) -> dict[str, Tensor]:
    """All arrays of an .npz file as tensors, bit for bit: floating point only, never pickled, none larger than what is stored."""
    import torch

    arrays = {}
    with open_zip(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            array = _read_npy(file, archive, entry)
            arrays[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))  # a copy that torch may write to
    return arrays


def _read_npy(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    import numpy as np
    from numpy.lib import format as npy

    try:
        with archive.open(entry) as stream:
            version = npy.read_magic(stream)
            shape, _, dtype = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version](stream)
            start = stream.tell()
        if dtype.hasobject or dtype.kind != "f" or dtype.itemsize > 8:
            why = "a pickled array can run code when it is opened" if dtype.hasobject else "weights are 16-, 32- or 64-bit floating point"
            raise FormatError(f"{file}: {entry.filename} holds {dtype}", why=why, fix="get the file from its publisher")
        expected = start + prod(shape) * dtype.itemsize
        if expected != entry.file_size or any(size < 0 for size in shape):
            raise FormatError(
                f"{file}: {entry.filename} says its shape is {list(shape)}",
                why=f"that takes {expected} bytes, {entry.file_size} are there",
                fix=RESTORE,
            )
        with archive.open(entry) as stream:
            return np.asarray(npy.read_array(stream, allow_pickle=False))
    except (ValueError, KeyError, TypeError, SyntaxError, OverflowError, MemoryError) as error:
        raise FormatError(f"{file}: {entry.filename} is not an array", why=f"{type(error).__name__}: {error}", fix=RESTORE) from error


def write_npz(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """An uncompressed .npz file without dates (equal tensors, equal bytes), written beside and renamed."""
    import os

    from numpy.lib import format as npy

    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in tensors.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                    npy.write_array(stream, tensor.detach().cpu().contiguous().numpy(), allow_pickle=False)
        with open(beside, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------- torch files
def torch_words(file: Path | None) -> set[str]:
    """Every text in the pickle of a torch file, its keys among them, without unpickling; empty for anything else; never raises."""
    if file is None:
        return set()
    try:
        with open_zip(file, stored=True) as archive:
            entry = next((e for e in archive.infolist() if PurePosixPath(e.filename).name == "data.pkl"), None)
            if entry is None or entry.file_size > MAX_NAMES_BYTES:
                return set()
            return {argument for code, argument, _ in pickletools.genops(archive.read(entry)) if "UNICODE" in code.name}
    except (FormatError, ValueError, KeyError, IndexError):
        return set()


def read_torch(file: Path) -> dict[str, Any]:
    """The map in a torch file, by `torch.load(weights_only=True)`; tensors on the CPU, none larger than what is stored."""
    import torch

    with open_zip(file, stored=True):
        pass  # torch.load would unpack whatever the directory says
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever it meets first
        said = str(error).splitlines()[0] if str(error) else ""
        raise FormatError(
            f"{file} is not a plain torch file of tensors",
            why=f"{type(error).__name__}: {said}",
            fix="get the file from its publisher; nothing in it was run",
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{file} holds a {type(found).__name__}", why="expected a map of names to tensors", fix=RESTORE)
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise FormatError(f"{file}: {name} is not a plain dense tensor", fix=RESTORE)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FormatError(
                f"{file}: {name} says its shape is {list(tensor.shape)}",
                why=f"{tensor.untyped_storage().nbytes()} bytes are there",
                fix=RESTORE,
            )
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


# ---------------------------------------------------------------------- safetensors, YAML
def safetensors_names(file: Path | None) -> set[str]:
    """Names of the tensors in a safetensors file, from its directory alone; empty for anything else; never raises."""
    try:
        if file is None or not file.is_file():
            return set()
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(length)) if 0 < length <= MAX_NAMES_BYTES else {}
        return set(found) - {"__metadata__"} if isinstance(found, dict) else set()
    except (OSError, ValueError, RecursionError):
        return set()


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML map without anchors (a few of which can stand for gigabytes); FormatError for anything else."""
    import yaml

    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise FormatError(f"{file} has {file.stat().st_size} bytes", why=f"expected at most {MAX_TEXT_BYTES}", fix=RESTORE)
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise FormatError(f"{file} refers to its own parts (YAML anchors)", fix="write them out")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read as YAML", why=f"{type(error).__name__}: {error}", fix=RESTORE) from error
    if not isinstance(found, dict):
        raise FormatError(f"{file} is a {type(found).__name__}", why="expected a map", fix=RESTORE)
    return found
