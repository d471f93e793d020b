"""The file `ae.pt` in, plain tensors and numbers out, and back: nothing in the file is executed, and it cannot claim more memory than it has."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE
from saehub.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 16 * 2**20
"""Of the part that describes the tensors (their numbers lie beside it)."""


def load(file: Path) -> dict[str, Any]:
    """The map in `file`; FormatError if it is damaged, holds anything but tensors and plain data, or was written to exhaust the reader."""
    import torch

    if not file.is_file():
        raise FormatError(f"{file} does not exist", fix=RESTORE)
    _check_archive(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # tensors are copied one by one
    except Exception as error:  # torch raises whatever the damage leads to
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error)
        raise FormatError(
            f"{file} holds more than tensors" if unsafe else f"{file} cannot be read",
            why="loading it would execute what it says, so it is refused" if unsafe else f"{file.stat().st_size} bytes",
            fix="if you trust its author, load it yourself and torch.save only its state_dict" if unsafe else RESTORE,
            said=f"{type(error).__name__}: {str(error)[:300]}",
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{file} holds a {type(found).__name__}", why="expected a state dict", fix=RESTORE)
    return dict(found)


def _check_archive(file: Path) -> None:
    """torch.save writes an uncompressed zip archive with checksums: a compressed entry could unpack to any size, and a wrong sum is damage."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise FormatError(
                        f"{file}: {entry.filename} is compressed",
                        why=f"{entry.file_size} bytes unpacked; torch.save compresses nothing",
                        fix=RESTORE,
                    )
                if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
                    raise FormatError(f"{file}: {entry.filename} has {entry.file_size} bytes", why="no state dict needs that many", fix=RESTORE)
                with archive.open(entry) as stream:
                    while stream.read(1 << 20):  # reading to the end compares the checksum
                        pass
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise FormatError(
            f"{file} is damaged, or not a torch.save file",
            why=f"{size} bytes; {error}",
            fix=f"{RESTORE}; if it is from before torch 1.6, or was saved without checksums: torch.save(torch.load(file, weights_only=True), file)",
        ) from error


def tensors(file: Path, state: Mapping[str, Any], copy: bool = True) -> dict[str, Tensor]:
    """The tensors of a state dict, each in memory of its own if `copy`; FormatError for anything else, and for a shape beyond the numbers."""
    import torch

    found = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise FormatError(
                f"{file}: {name} is a {type(value).__name__}", why="expected a state dict: names and dense tensors", fix=RESTORE
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise FormatError(
                f"{file}: {name} has shape {list(value.shape)}, but only {value.untyped_storage().nbytes()} bytes are stored for it",
                fix=RESTORE,
            )
        found[name] = value.detach().clone(memory_format=torch.contiguous_format) if copy else value.detach()
    return found


def save(file: Path, state: Mapping[str, Tensor]) -> None:
    """`torch.save` of a state dict, written beside and renamed, so that it is whole or absent."""
    import torch

    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as stream:
            torch.save({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
