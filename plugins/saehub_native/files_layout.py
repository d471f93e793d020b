"""A folder of safetensors or npy files in; for every site one long table of rows, mapped from disk and read in slices, out. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saehub.errors import FormatError, UsageError, did_you_mean
from saehub.jsonio import hash_json, sha256_file

if TYPE_CHECKING:
    from saehub_native.extract_config import FilesConfig

IDS = ("token_ids", "positions", "sequences")
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits, to be viewed as such
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}


@dataclass(frozen=True)
class Part:
    """One tensor of one file."""

    file: Path
    kind: str
    """safetensors' word for the dtype."""
    shape: tuple[int, ...]
    offset: int

    def rows(self, width_dims: int) -> int:
        """Rows: the product of all dimensions but the last `width_dims`."""
        return int(np.prod(self.shape[: len(self.shape) - width_dims], dtype=np.int64))

    def map(self, width_dims: int) -> np.ndarray:
        """[rows, d] (or [rows]) mapped from disk."""
        flat = (self.rows(width_dims), *self.shape[len(self.shape) - width_dims :])
        if 0 in flat:
            return np.empty(flat, dtype=(_FLOATS | _INTEGERS)[self.kind])
        return np.memmap(self.file, dtype=(_FLOATS | _INTEGERS)[self.kind], mode="r", offset=self.offset, shape=flat)


class Column:
    """Parts put end to end."""

    def __init__(self, name: str, parts: list[Part], width_dims: int):
        self.name, self.parts, self.width_dims = name, parts, width_dims
        self.kind = parts[0].kind
        self.starts = np.concatenate([[0], np.cumsum([part.rows(width_dims) for part in parts])]).astype(np.int64)
        self.rows = int(self.starts[-1])
        self._maps: dict[int, np.ndarray] = {}

    def read(self, i: int, j: int) -> np.ndarray:
        """Rows i to j, copied."""
        pieces = []
        for number in range(int(np.searchsorted(self.starts, i, side="right")) - 1, len(self.parts)):
            start, end = int(self.starts[number]), int(self.starts[number + 1])
            if start >= j:
                break
            if number not in self._maps:
                self._maps[number] = self.parts[number].map(self.width_dims)
            pieces.append(self._maps[number][max(i, start) - start : min(j, end) - start])
        return np.concatenate(pieces) if pieces else self.parts[0].map(self.width_dims)[:0]


    def place(self, row: int) -> tuple[Path, str]:
        """The file that holds a row, and `row 3`, or `sequence 0, position 3`, inside of it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        part, inside = self.parts[number], row - int(self.starts[number])
        if len(part.shape) - self.width_dims == 2:
            return part.file, f"sequence {inside // part.shape[1]:,}, position {inside % part.shape[1]:,}"
        return part.file, f"row {inside:,}"


class Layout:
    """What a folder holds."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], files: list[Path], exclude_ids: tuple[int, ...]):
        self.folder, self.files, self.exclude_ids = folder, files, np.array(exclude_ids, dtype=np.int64)
        self.ids = {name: column for name, column in columns.items() if name in IDS}
        self.sites = {name: column for name, column in columns.items() if name not in IDS}
        self.widths = {name: column.parts[0].shape[-1] for name, column in self.sites.items()}
        self.n_rows = next(iter(self.sites.values())).rows
        shape = next(iter(self.sites.values())).parts[0].shape
        self.context = shape[1] if len(shape) == 3 else None
        """Positions a sequence where tensors say so ([sequences, positions, d]), else None."""

    @classmethod
    def scan(cls, config: FilesConfig) -> Layout:
        """Read the headers. UsageError: no such folder, nothing in it, a name that is not there; FormatError: a broken file, rows that do not match."""
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise UsageError(
                f"activations {config.path!r}: no such folder",
                where="extract.with.path",
                why=f"looked at {folder.absolute()}",
                fix="give a folder of .safetensors or .npy files",
            )
        tensors = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
        found = _from_safetensors(tensors) if tensors else _from_npy(folder)
        if not any(name not in IDS for name in found):
            raise UsageError(
                f"activations {config.path!r}: the folder holds none",
                where="extract.with.path",
                fix="put .safetensors files there, or <site>.npy; `native/files` describes the layouts",
            )
        renamed = {name: site for site, name in config.names.items()}
        missing = [name for name in renamed if name not in found]
        if missing:
            raise UsageError(
                f"the files hold no tensor {missing[0]!r}{did_you_mean(missing[0], found)}",
                where="extract.with.names",
                why=f"there are: {', '.join(found)}",
            )
        columns = {renamed.get(name, name): _column(name, parts) for name, parts in found.items()}
        files = sorted({part.file for parts in found.values() for part in parts})
        rows = {name: column.rows for name, column in columns.items()}
        if len(set(rows.values())) > 1:
            raise FormatError(
                f"{folder}: the tensors do not hold the same rows",
                why=", ".join(f"{name}: {n}" for name, n in rows.items()),
                fix="write them from one pass, in one order",
            )
        if not next(iter(rows.values())):
            raise FormatError(f"{folder}: the tensors hold no rows", fix="write activations there first")
        if config.exclude_ids and "token_ids" not in columns:
            raise UsageError(
                "exclude_ids needs token ids",
                where="extract.with.exclude_ids",
                why=f"{folder} holds no `token_ids`",
                fix="store them beside the activations",
            )
        return cls(folder, columns, files, config.exclude_ids)

    def keep(self, i: int, j: int) -> np.ndarray:
        """bool [j - i]: rows that are not excluded."""
        if not len(self.exclude_ids):
            return np.ones(j - i, dtype=bool)
        return ~np.isin(self.ids["token_ids"].read(i, j), self.exclude_ids)

    def kept_rows(self) -> int:
        """Rows after exclusion."""
        step = 1 << 20
        return sum(int(self.keep(i, min(i + step, self.n_rows)).sum()) for i in range(0, self.n_rows, step))

    def content_hash(self) -> str:
        """SHA-256 over names and contents of all files."""
        return hash_json({str(file.relative_to(self.folder)): sha256_file(file) for file in self.files})


def _column(name: str, parts: list[Part]) -> Column:
    width_dims = 0 if name in IDS else 1
    allowed, dims = (_INTEGERS, (1, 2)) if name in IDS else (_FLOATS, (2, 3))
    first = parts[0]
    for part in parts:
        if part.kind not in allowed or len(part.shape) not in dims:
            raise FormatError(
                f"{part.file}: {name!r} is {part.kind} {list(part.shape)}",
                why=f"it must be {' or '.join(allowed)}, with {dims[0]} or {dims[1]} dimensions",
            )
        if (
            part.kind != first.kind
            or len(part.shape) != len(first.shape)
            or (not width_dims or part.shape[-1] != first.shape[-1])
            and width_dims
        ):
            raise FormatError(
                f"{part.file}: {name!r} is {part.kind} {list(part.shape)}",
                why=f"in {first.file.name} it is {first.kind} {list(first.shape)}",
                fix="write all parts alike",
            )
    return Column(name, parts, width_dims)


def _from_safetensors(files: list[Path]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    names: set[str] | None = None
    for file in files:
        header, start = _header(file)
        if names is None:
            names = set(header)
        elif set(header) != names:
            raise FormatError(
                f"{file} holds other tensors than {files[0].name}",
                why=f"{', '.join(sorted(header))} against {', '.join(sorted(names))}",
                fix="write all files alike",
            )
        for name, entry in header.items():
            found.setdefault(name, []).append(Part(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0]))
    return found


def _header(file: Path) -> tuple[dict, int]:
    """A safetensors header (8 bytes of length, JSON) and where the data begins."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 << 20):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"the header announces {8 + length + end} bytes, the file has {size}")
        return header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file} is not a whole safetensors file", why=str(error), fix="write it again") from None


def _from_npy(folder: Path) -> dict[str, list[Part]]:
    found = {file.stem: [_npy(file)] for file in sorted(folder.glob("*.npy"))}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if parts := [_npy(file) for file in sorted(inner.glob("*.npy"))]:
            found[inner.name] = parts
    return found


def _npy(file: Path) -> Part:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(
            f"{file} cannot be read as a NumPy array", why=str(error), fix="write it with numpy.save, without objects"
        ) from None
    kinds = {np.dtype(text).str: kind for kind, text in (_FLOATS | _INTEGERS).items() if kind != "BF16"}
    if array.dtype.str not in kinds or not array.flags.c_contiguous:
        raise FormatError(
            f"{file} has dtype {array.dtype} or is not in C order",
            why=f"known: {', '.join(sorted(kinds))}",
            fix="save numpy.ascontiguousarray(x, dtype='float32')",
        )
    return Part(file, kinds[array.dtype.str], array.shape, getattr(array, "offset", 0))
