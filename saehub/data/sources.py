"""A `source:` of a recipe in; its documents, one after another and never all in memory, out.

Splits are the hub's own and mean the same for every source: `train` and `heldout` never share a document. Embedded sources split by
module path; local files and Hugging Face datasets split by the SHA-256 of the document (10 % held out; of a dataset, within its `train`
split). `all` is everything; any other word is a split of the Hugging Face dataset.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError, StageFailed, UsageError, did_you_mean

if TYPE_CHECKING:
    from saehub.recipe.schema import SourceEntry

SUFFIXES = (".txt", ".jsonl", ".parquet")
HELDOUT_PERCENT = 10
PIECE_CHARS = 8192
"""A .txt file becomes documents of about this length, cut at blank lines (else at line ends)."""
_FORMS = "use builtin/python-docs, builtin/python-code, a .txt, .jsonl or .parquet file, a folder of them, or a Hugging Face dataset id"


@dataclass(frozen=True)
class Document:
    """One text, or one conversation."""

    text: str = ""
    messages: tuple[dict, ...] = field(default=())
    """Chat messages with `role` and `content`; empty for plain text."""


def is_local(source: str) -> bool:
    """Whether a source names files: it exists, or is written like a path."""
    return not source.startswith("builtin/") and (
        Path(source).expanduser().exists()
        or source.startswith((".", "~", "/"))
        or source.endswith(SUFFIXES)
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
    )


def check_source(entry: SourceEntry) -> None:
    """UsageError now for what would fail later: an unknown embedded source, a missing file, a split that does not exist. No network."""
    if entry.source.startswith("builtin/"):
        from saehub import builtin

        names = [f"builtin/{name}" for name in builtin.SOURCES]
        if entry.source not in names:
            raise UsageError(
                f"source {entry.source!r} does not exist{did_you_mean(entry.source, names)}", fix=f"embedded sources: {', '.join(names)}"
            )
    elif is_local(entry.source):
        _files(entry.source)
    else:
        return
    if entry.split not in ("train", "heldout", "all"):
        raise UsageError(
            f"split {entry.split!r} of {entry.source!r} does not exist{did_you_mean(entry.split, ('train', 'heldout'))}",
            fix="use train, heldout or all",
        )


def open_source(entry: SourceEntry) -> Iterator[Document]:
    """The documents of one split, in a fixed order; empty ones are left out.

    Raises UsageError (no such source, file, split or field), FormatError (a file that cannot be read, with its line or row) and
    StageFailed (a dataset that cannot be fetched, or a split without documents).
    """
    check_source(entry)
    read = given = 0
    for document, chosen in _split(entry, _documents(entry)):
        read += 1
        if chosen:
            given += 1
            yield document
    if not read:
        raise StageFailed(
            f"source {entry.source!r} holds no text", where="data", why="nothing but blank space was read", fix="put text there, or name another source"
        )
    if not given:
        raise StageFailed(
            f"source {entry.source!r} has no documents in split {entry.split!r}",
            where="data",
            why=f"all of its {read} documents are in the other one" if read > 1 else "its one document is in the other one",
            fix="use another split (`all` takes everything), or give more text",
        )


def _documents(entry: SourceEntry) -> Iterator[Document]:
    if entry.source.startswith("builtin/"):
        from saehub.builtin import text

        try:
            for split in ("train", "heldout") if entry.split == "all" else (entry.split,):
                for document in text.documents(entry.source, split):
                    yield Document(document.text)
        except FileNotFoundError as error:
            raise StageFailed(
                f"source {entry.source!r} cannot be read", why=str(error), fix="use a local text file as the source"
            ) from error
    elif is_local(entry.source):
        for path in _files(entry.source):
            yield from {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix](path, entry.field)
    else:
        yield from _hub(entry)


def _split(entry: SourceEntry, documents: Iterator[Document]) -> Iterator[tuple[Document, bool]]:
    """Documents that hold anything, and whether each is in the split."""
    by_hash = not entry.source.startswith("builtin/") and entry.split in ("train", "heldout")
    for document in documents:
        if not (document.text.strip() or document.messages):
            continue
        chosen = True
        if by_hash:
            content = document.text or json.dumps(document.messages, sort_keys=True, default=str)
            number = int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 100
            chosen = (number < HELDOUT_PERCENT) == (entry.split == "heldout")
        yield document, chosen


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UsageError(
                f"source {source!r} is a {path.suffix or 'suffixless'} file", fix="give a " + ", ".join(SUFFIXES) + " file, or rename it"
            )
        return _not_empty(source, [path])
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith("."))
        if not found:
            raise UsageError(f"source {source!r} holds no {', '.join(SUFFIXES)} file", fix="put text there, or name another folder")
        return _not_empty(source, found)
    near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UsageError(f"source {source!r}: no such file or folder{near}", why=f"looked at {path.absolute()}", fix=_FORMS)


def _not_empty(source: str, files: list[Path]) -> list[Path]:
    if not any(file.stat().st_size for file in files):
        holds = f"{files[0].absolute()} has 0 bytes" if len(files) == 1 else f"all its {len(files)} files have 0 bytes"
        raise UsageError(f"source {source!r} is empty", why=holds, fix="put text there, or name another source")
    return files


def _text(path: Path, field_name: str) -> Iterator[Document]:
    lines: list[str] = []
    length = 0
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                blank = not line.strip()
                if length and (length + len(line) > 2 * PIECE_CHARS or (blank and length >= PIECE_CHARS)):
                    yield Document("".join(lines))
                    lines, length = [], 0
                while len(line) > 2 * PIECE_CHARS:  # a file without line ends
                    yield Document(line[:PIECE_CHARS])
                    line = line[PIECE_CHARS:]
                lines.append(line)
                length += len(line)
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read as UTF-8 text", why=str(error), fix=f"convert it, for instance: iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
        ) from error
    yield Document("".join(lines))


def _jsonl(path: Path, field_name: str) -> Iterator[Document]:
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise FormatError(f"{path}:{number} is not JSON", why=str(error), fix="put one JSON object on each line") from None
                if not isinstance(row, dict):
                    raise FormatError(
                        f"{path}:{number} is not a JSON object", why=f"it is a {type(row).__name__}", fix='write {"text": "…"} on each line'
                    )
                yield _from_row(row, field_name, f"{path}:{number}")
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} cannot be read as UTF-8 text", why=str(error), fix="convert it to UTF-8") from error


def _parquet(path: Path, field_name: str) -> Iterator[Document]:
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in table.schema_arrow.names if name == field_name or name in _CHAT_FIELDS] or None
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _from_row(row, field_name, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(
            f"{path} cannot be read as Parquet",
            where=f"after row {number}",
            said=str(error),
            fix="write it again, or leave it out of the folder",
        ) from error


def _hub(entry: SourceEntry) -> Iterator[Document]:
    import datasets

    split = "train" if entry.split in ("train", "heldout", "all") else entry.split
    where = f"dataset {entry.source!r}, split {split!r}"
    try:
        table = datasets.load_dataset(entry.source, entry.config, split=split, streaming=entry.streaming, revision=entry.revision)
        for number, row in enumerate(table, start=1):
            yield _from_row(row, entry.field, f"{where}, row {number}")
    except (UsageError, FormatError):
        raise
    except ValueError as error:  # an unknown split or configuration; datasets' words list the ones that exist
        raise UsageError(
            f"{where} cannot be opened", said=str(error), fix="set `split:` or `config:` of the source to one of those named above"
        ) from error
    except Exception as error:  # datasets and the hub client have a dozen ways to say "no"
        raise StageFailed(
            f"{where} cannot be read",
            why="the hub is unreachable or switched off (HF_HUB_OFFLINE), or the dataset does not exist or is gated",
            fix=f"where the hub is reachable: `hf auth login`, then `hf download --repo-type dataset {entry.source}`; or use a local .jsonl or .parquet file",
            said=f"{type(error).__name__}: {error}",
        ) from error


_CHAT_FIELDS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def _from_row(row: dict, field_name: str, where: str) -> Document:
    value = row.get(field_name)
    conversation = value if isinstance(value, list) else next((row[name] for name in _CHAT_FIELDS if isinstance(row.get(name), list)), None)
    if isinstance(conversation, list):
        messages = tuple(_message(turn, where) for turn in conversation)
        return Document(value if isinstance(value, str) else "", messages)
    if field_name not in row:
        raise UsageError(
            f"{where} has no field {field_name!r}{did_you_mean(field_name, row)}",
            why=f"its fields: {', '.join(map(str, row)) or 'none'}",
            fix="set `field:` of the source to the one that holds the text",
        )
    if value is None:
        return Document()
    if not isinstance(value, str):
        raise UsageError(
            f"{where}: field {field_name!r} is not text",
            why=f"it is a {type(value).__name__}",
            fix="set `field:` of the source to the one that holds the text",
        )
    return Document(value)


def _message(turn: Any, where: str) -> dict:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise FormatError(
        f"{where}: a message without role and content", why=f"it is {str(turn)[:80]!r}", fix='write {"role": "user", "content": "…"}'
    )
