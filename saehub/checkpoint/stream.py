"""Tensors of any size in; their hashes, checks, comparisons and safetensors files out, a block at a time, so that none is in memory whole.

A safetensors file is mapped when it is opened, so its tensors cost memory only where they are touched. Everything here goes through them
in blocks and gives the pages back behind itself; a tensor that is not mapped from a file stays where it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 2**24
"""16 MiB at a time."""
_PAGEOUT = 21  # Linux' MADV_PAGEOUT: unlike DONTNEED it cannot lose what was written to a page
# safetensors' own order of dtypes within a file, widest alignment first
_DTYPES = (("int64", "I64"), ("float64", "F64"), ("float32", "F32"), ("int32", "I32"), ("bfloat16", "BF16"), ("float16", "F16"), ("uint8", "U8"), ("bool", "BOOL"))  # fmt: skip


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's elements in row-major order as flat contiguous CPU blocks; a transposed one is turned block by block. A block must not
    be kept: its pages may be given back once the next one is asked for."""
    tensor = tensor.detach()
    if not tensor.numel():
        return
    release = _release if _is_mapped(tensor) else lambda part: None
    if tensor.is_contiguous():
        flat, step = tensor.reshape(-1), max(1, BLOCK_BYTES // tensor.element_size())
        for start in range(0, flat.shape[0], step):
            yield flat[start : start + step].cpu()
            release(flat[start : start + step])
        return
    rows = max(1, BLOCK_BYTES * tensor.shape[0] // (tensor.numel() * tensor.element_size()))
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows].cpu().contiguous().reshape(-1)
    release(tensor)


def tensor_hash(tensor: Tensor) -> str:
    """`saehub.jsonio.sha256_tensor`: SHA-256 (hex) over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{_word(tensor)}{list(tensor.shape)}".encode())
    for block in blocks(tensor):
        digest.update(_bytes(block))
    return digest.hexdigest()


def count_bad(tensor: Tensor, *, allow_infinite: bool = False) -> int:
    """How many elements are NaN or (unless allowed) infinite; 0 for whole numbers."""
    if not tensor.is_floating_point():
        return 0
    return sum(int((block.isnan() if allow_infinite else ~block.isfinite()).sum()) for block in blocks(tensor))


def equal(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and values (as `torch.equal`: NaN equals nothing)."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_contiguous() != b.is_contiguous():
        return torch.equal(a.cpu(), b.cpu())
    return all(torch.equal(x, y) for x, y in zip(blocks(a), blocks(b), strict=True))


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, byte for byte the one that `safetensors.torch.save_file` writes, without a copy of any tensor.

    Eight bytes with the length of a JSON header (dtype, shape and offsets by name), the header, the tensors' bytes one after the other.
    """
    known = dict(_DTYPES)
    if sys.byteorder != "little" or any(_word(t) not in known for t in tensors.values()):
        from safetensors.torch import save_file

        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file, dict(metadata) if metadata else None)
        return
    rank = {word: place for place, (word, _) in enumerate(_DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[_word(tensors[name])], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": known[_word(tensor)], "shape": list(tensor.shape), "data_offsets": [start, end]}
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words += b" " * (-len(words) % 8)
    with open(file, "wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            for block in blocks(tensors[name]):
                stream.write(_bytes(block))


def _bytes(block: Tensor) -> memoryview:
    import torch

    return memoryview(block.view(torch.uint8).numpy())


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor lives in a file's pages, which the system can be asked to take back (the storage itself does not say)."""
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < mmap.PAGESIZE or _advise() is None:
        return False
    address = tensor.data_ptr()
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as regions:
            for line in regions:  # start-end permissions offset device inode [path]
                span, _, _, _, inode, *_ = line.split(maxsplit=5)
                first, last = (int(word, 16) for word in span.split("-"))
                if first <= address < last:
                    return inode != "0"
    except (OSError, ValueError):
        pass
    return False


def _release(tensor: Tensor) -> None:
    """Give the pages of a mapped tensor back to the system; they are read again when touched."""
    advise = _advise()
    start = tensor.data_ptr() if tensor.is_contiguous() else tensor.untyped_storage().data_ptr()
    length = tensor.numel() * tensor.element_size() if tensor.is_contiguous() else tensor.untyped_storage().nbytes()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        advise(first, last - first, _PAGEOUT)  # a refusal costs memory, nothing else


@lru_cache(maxsize=1)
def _advise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found
