"""Blocks in; the same blocks, bit for bit, from files with content checksums out. A spool is a store whose blocks are deleted once consumed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saehub.activations.blocks import Block
from saehub.errors import FormatError, StageFailed
from saehub.jsonio import read_json, sha256_file, write_json_atomic

_EXTRAS = ("token_ids", "positions", "sequences")


class ShardStore:
    """A folder with `block-000012.safetensors` (the sites, `token_ids`, `positions`, `sequences`) and, written last, `block-000012.json`."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def _files(self, b: int) -> tuple[Path, Path]:
        return self.path / f"block-{b:06d}.safetensors", self.path / f"block-{b:06d}.json"

    def complete(self, b: int) -> bool:
        """Whether block `b` is whole: its JSON is there."""
        return self._files(b)[1].is_file()

    def write(self, b: int, block: Block) -> None:
        """Write block `b`, replacing what is there; a reader sees all of it or nothing. StageFailed when the disk is full."""
        data, about = self._files(b)
        columns = (block.token_ids_N, block.positions_N, block.sequences_N)
        tensors = {site: x_ND.contiguous() for site, x_ND in block.acts.items()} | {
            name: x for name, x in zip(_EXTRAS, columns, strict=True) if x is not None
        }
        beside = data.with_name(f".{data.name}.{os.getpid()}.tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            about.unlink(missing_ok=True)
            save_file(tensors, beside)
            size = beside.stat().st_size
            with open(beside, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(beside, data)
            write_json_atomic(
                about,
                {
                    "block": b,
                    "first_row": block.first_row,
                    "hash": block.hash,
                    "sites": sorted(block.acts),
                    "bytes": size,
                    "sha256": sha256_file(data),
                },
            )
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
                raise StageFailed(
                    f"the disk is full: block {b} could not be written to {self.path}",
                    why=str(error),
                    fix="free some space, set SAEHUB_HOME to another disk, or set extract.store to none; then run again",
                ) from error
            raise StageFailed(
                f"block {b} could not be written to {self.path}", said=str(error), fix="check the folder's permissions"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def read(self, b: int) -> Block:
        """Block `b` as it was written. FormatError that names the file when it is missing or its SHA-256 is another."""
        data, about = self._files(b)
        fix = f"delete {data} and {about.name}; the block is extracted again"
        facts = read_json(about)
        if not data.is_file():
            raise FormatError(f"{data} is missing", fix=fix)
        if (size := data.stat().st_size) != facts["bytes"] or sha256_file(data) != facts["sha256"]:
            raise FormatError(f"{data} is damaged", why=f"it has {size} bytes; size or SHA-256 is not what {about.name} says", fix=fix)
        with safe_open(data, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
        extras = [tensors.pop(name, None) for name in _EXTRAS]
        return Block(tensors, *extras, first_row=facts["first_row"], hash=facts["hash"])

    def delete(self, b: int) -> None:
        """Let block `b` go (its JSON first, so that it is never half there)."""
        data, about = self._files(b)
        about.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
