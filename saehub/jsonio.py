"""Plain data and tensors in; canonical JSON, content hashes and files that are either complete or absent out."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor


def canonical(data: Any) -> str:
    """JSON with sorted keys, no spaces, no NaN: equal data, equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")


def hash_json(data: Any) -> str:
    """SHA-256 (hex) of `canonical(data)`."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_tensor(tensor: Tensor) -> str:
    """SHA-256 (hex) over dtype, shape and the contiguous bytes of a tensor."""
    import torch

    whole = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{str(whole.dtype).removeprefix('torch.')}{list(whole.shape)}".encode())
    if whole.numel():
        digest.update(memoryview(whole.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def write_text_atomic(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json_atomic(path: Path, data: Any) -> None:
    """`write_text_atomic` of indented JSON (NaN refused)."""
    write_text_atomic(path, json.dumps(data, indent=1, allow_nan=False, default=_plain) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON; a missing or broken file is a FormatError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} cannot be read as JSON", why=str(error), fix="restore the file, or delete its folder and run again") from error
