"""Weighted text sources and a tokenizer in; a folder of packed token sequences in training order, its content hash and its row counts out.

A folder holds `tokens-00000.safetensors` (int32 [sequences, context], in the order they were packed), `index.safetensors` (per sequence:
rows kept and source) and, last, `manifest.json`. Sequences 0 … calibration_sequences - 1 are for calibration; the others are for training,
in an order drawn from the seed. Whole sequences are one or the other, so no calibration row is ever a training row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saehub.api import ModelSpec
from saehub.data.model import load_tokenizer, read_shape, tokenizer_hash
from saehub.data.order import permutation
from saehub.data.packing import Packer, TokenPolicy, bos_id, check_policy, eos_id, excluded_ids, pick
from saehub.data.sources import is_local
from saehub.errors import FormatError, StageFailed, UsageError
from saehub.jsonio import hash_json, read_json, sha256_file, write_json_atomic
from saehub.seeds import derive

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.recipe.schema import SourceEntry

__all__ = ["TokenDataset", "TokenPolicy", "build"]

SHARD_TOKENS = 4 << 20
FORMAT = 1


def build(
    sources: Sequence[tuple[SourceEntry, float]],
    tokenizer_source: ModelSpec,
    policy: TokenPolicy,
    out_dir: Path,
    *,
    rows: int,
    calibration: int = 0,
    seed: int = 0,
    repeat: bool = False,
    emit: Callable[[dict], None] = lambda event: None,
    place: str = "data.train",
) -> TokenDataset:
    """Pack text into `out_dir` until it holds `rows` training rows beside `calibration` rows (rows: tokens that are not excluded).

    Deterministic in the documents, the tokenizer and the arguments; memory is bounded by one shard and one window of documents a source.
    With `repeat`, a source that ends begins again while others go on, so that weights hold; when all have ended, the folder holds one
    epoch and `BlockStream` repeats it. Raises StageFailed when the text runs out without `repeat`, naming the rows there are; `place` is
    what the recipe calls this dataset.
    """
    out_dir = Path(out_dir)
    if not sources or any(not weight > 0 for _, weight in sources):
        raise UsageError("a mixture needs at least one source, and weights above 0", where="data.train.mix", fix="correct the weights")
    tokenizer = load_tokenizer(tokenizer_source)
    shape = read_shape(tokenizer_source.name, tokenizer_source.revision)
    check_policy(policy, tokenizer, shape.context)
    excluded = np.array(excluded_ids(policy, tokenizer), dtype=np.int32)
    total = sum(weight for _, weight in sources)
    weights = [weight / total for _, weight in sources]
    window = min(max((rows + calibration) * 32, 1 << 20), 32 << 20)  # characters; a small set of rows needs no large window
    state = {"progress": 0.0, "text": "reading text"}
    packers = [
        Packer(entry, tokenizer, policy, _seed(seed, s, entry), window, lambda: emit(dict(state))) for s, (entry, _) in enumerate(sources)
    ]
    writer = _Writer(out_dir, policy.context)

    def draw(wanted: int, what: str) -> tuple[int, int]:
        """Sequences until `wanted` rows are there; returns (rows, sequences)."""
        got = sequences = 0
        while got < wanted:
            s = pick(weights, counts)
            ids = packers[s].next()
            if ids is None:
                if not repeat:
                    raise _too_few(sources, s, rows, calibration, what, got, writer.sequences, place)
                if all(packer.passes > 1 or packer.ended for packer in packers) and what == "training":
                    break  # one epoch
                if what != "training":
                    raise _too_few(sources, s, rows, calibration, what, got, writer.sequences, place)
                packers[s].restart()
                continue
            kept = policy.context - int(np.isin(np.array(ids, dtype=np.int32), excluded).sum())
            writer.add(ids, kept, s)
            counts[s] += 1
            got += kept
            sequences += 1
            if sequences % 512 == 0:
                state.update(progress=min(1.0, got / wanted), text=f"{what} tokens: {got:,} of {wanted:,} rows")
                emit(dict(state))
        return got, sequences

    counts = [0] * len(sources)
    calibration_rows, calibration_sequences = draw(calibration, "calibration") if calibration else (0, 0)
    for packer in packers:
        packer.reserve()
    training_rows, _ = draw(rows, "training")
    if training_rows == 0:
        raise _too_few(sources, 0, rows, calibration, "training", 0, writer.sequences, place)
    shards = writer.finish()
    vocabulary = {
        "hash": tokenizer_hash(tokenizer_source),
        "name": tokenizer_source.name,
        "size": len(tokenizer),
        "bos": bos_id(tokenizer),
        "eos": eos_id(tokenizer),
        "pad": tokenizer.pad_token_id,
    }
    manifest = {
        "format": FORMAT, "kind": "tokens", **asdict(policy), "exclude_ids": excluded.tolist(), "seed": seed, "repeat": repeat,
        "requested": {"rows": rows, "calibration": calibration},
        "n_sequences": writer.sequences, "calibration_sequences": calibration_sequences,
        "rows": training_rows, "calibration_rows": calibration_rows,
        "tokenizer": vocabulary,
        "sources": [_about(entry, weight, packer, counts) for (entry, _), weight, packer in zip(sources, weights, packers, strict=True)],
        "shards": shards,
    }  # fmt: skip
    for s, about in enumerate(manifest["sources"]):
        about.update(sequences=counts[s], share=counts[s] / sum(counts))
    if any(entry.source.startswith("builtin/") for entry, _ in sources):
        manifest["python"] = platform.python_version()
    # What a trainer sees: the ids, in their order, with the same rows left out. Not how they were named or stored.
    manifest["hash"] = hash_json(
        {key: manifest[key] for key in ("n_sequences", "calibration_sequences", "context", "exclude_ids", "seed")} | {"ids": writer.digest}
    )
    write_json_atomic(out_dir / "manifest.json", manifest)
    return TokenDataset.open(out_dir)


def _seed(seed: int, index: int, entry: SourceEntry) -> int:
    """The seed of one source's document order. Where files lie must not matter: local ones are told apart by their place in the mix."""
    return derive("source", seed, index, "files" if is_local(entry.source) else entry.source)


def _about(entry: SourceEntry, weight: float, packer: Packer, counts: list[int]) -> dict:
    return {
        "source": entry.source,
        "split": entry.split,
        "field": entry.field,
        "config": entry.config,
        "revision": entry.revision,
        "weight": weight,
        "tokens": packer.tokens,
        "documents": packer.documents,
        "passes": packer.passes,
    }


def _too_few(sources: Sequence, s: int, rows: int, calibration: int, what: str, got: int, sequences: int, place: str) -> StageFailed:
    name = sources[s][0].source
    mixed = f" at these weights ({name!r} ended first)" if len(sources) > 1 else ""
    if what == "calibration":
        return StageFailed(
            f"source {name!r} has too little text for {calibration:,} calibration rows",
            where="extract.calibration",
            why=f"it gives {got:,} rows in all{mixed}",
            fix="lower extract.calibration, or give more text",
        )
    trains = place == "data.train"
    return StageFailed(
        f"the text ran out: {got:,} {'training ' if trains else ''}rows are available{mixed}, {rows:,} were asked for",
        where=f"{place}.tokens",
        why=f"{sequences:,} sequences were packed" + (f", {calibration:,} rows of them for calibration" if calibration else ""),
        fix=f"set {place}.tokens to at most {got}, {'write `repeat: true`, ' if trains else ''}or give more text"
        if got
        else "give more text" + (", or lower extract.calibration" if calibration else ""),
    )


class _Writer:
    """Sequences in; shards of bounded size on disk, with their hashes."""

    def __init__(self, out_dir: Path, context: int):
        self.dir, self.context = out_dir, context
        self.sequences = 0
        self._rows: list[np.ndarray] = []
        self._kept, self._source = array("i"), array("i")  # 8 bytes a sequence, whatever the size of the corpus
        self._shards: list[dict] = []
        self._hash = hashlib.sha256()
        self._per_shard = max(1, SHARD_TOKENS // context)
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "manifest.json").unlink(missing_ok=True)
        for old in (*out_dir.glob("tokens-*.safetensors"), *out_dir.glob("index.safetensors")):
            old.unlink()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, ids: list[int], kept: int, source: int) -> None:
        row = np.array(ids, dtype="<i4")
        self._hash.update(row.tobytes())
        self._rows.append(row)
        self._kept.append(kept)
        self._source.append(source)
        self.sequences += 1
        if len(self._rows) == self._per_shard:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            name = f"tokens-{len(self._shards):05d}.safetensors"
            self._save(name, {"tokens": np.stack(self._rows)})
            self._shards.append({"file": name, "sequences": len(self._rows), "sha256": sha256_file(self.dir / name)})
            self._rows = []

    def _save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        try:
            save_file(arrays, self.dir / name)
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise StageFailed(
                    f"the disk is full: {self.dir / name} could not be written",
                    fix="free some space, or set SAEHUB_HOME to another disk, and run again",
                ) from error
            raise

    def finish(self) -> list[dict]:
        self._flush()
        self._save("index.safetensors", {"kept": np.array(self._kept, dtype=np.int32), "source": np.array(self._source, dtype=np.int32)})
        return [*self._shards, {"file": "index.safetensors", "sha256": sha256_file(self.dir / "index.safetensors")}]


class TokenDataset:
    """Packed sequences on disk, opened for reading; sequences are numbered in the order they are used."""

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest = path, manifest
        self.n_sequences: int = manifest["n_sequences"]
        """All sequences, calibration included."""
        self.calibration_sequences: int = manifest["calibration_sequences"]
        """The first so many are for calibration, never for training."""
        self.context: int = manifest["context"]
        self.rows: int = manifest["rows"]
        """Training rows in one epoch."""
        self.calibration_rows: int = manifest["calibration_rows"]
        self.hash: str = manifest["hash"]
        """SHA-256 of the token ids, their order and the excluded ids."""
        self._excluded = np.array(manifest["exclude_ids"], dtype=np.int32)
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, path: Path) -> TokenDataset:
        """Open a finished folder; FormatError when it is not one. Contents are checked against their hashes when they are first read."""
        path = Path(path)
        manifest = read_json(path / "manifest.json")
        if manifest.get("kind") != "tokens" or manifest.get("format") != FORMAT:
            raise FormatError(
                f"{path} is not a token dataset of format {FORMAT}",
                why=f"its manifest says {manifest.get('kind')!r}, {manifest.get('format')!r}",
            )
        return cls(path, manifest)

    @cached_property
    def _kept(self) -> np.ndarray:
        from safetensors.numpy import load_file

        self._check(self.manifest["shards"][-1])
        return load_file(self.path / "index.safetensors")["kept"].astype(np.int64)

    @cached_property
    def _places(self) -> np.ndarray:
        """Of each stored sequence: where it stands in its source's text, sources apart by more than any text holds."""
        from safetensors.numpy import load_file

        self._check(self.manifest["shards"][-1])
        source = load_file(self.path / "index.safetensors")["source"].astype(np.int64)
        places = source << 40
        for s in np.unique(source):
            places[source == s] += np.arange(int((source == s).sum()))
        return places

    def places(self, sequences_N: np.ndarray) -> np.ndarray:
        """int64 [n]: sequences (numbered in the order of use) with consecutive places follow each other in one source's text."""
        return self._places[self._order[sequences_N]]

    @cached_property
    def _order(self) -> np.ndarray:
        """Stored index of each sequence in the order of use."""
        first = self.calibration_sequences
        return np.concatenate([np.arange(first), first + permutation(self.n_sequences - first, "sequences", self.manifest["seed"])])

    def _check(self, shard: dict) -> None:
        file = self.path / shard["file"]
        if not file.is_file() or sha256_file(file) != shard["sha256"]:
            raise FormatError(
                f"{file} is {'damaged' if file.is_file() else 'missing'}",
                why="its SHA-256 is not the one in manifest.json" if file.is_file() else None,
                fix=f"delete {self.path} and run again: the tokens are built anew",
            )

    def _shard(self, number: int) -> np.ndarray:
        """int32 [sequences, context], mapped from disk; its hash is checked the first time."""
        if number not in self._maps:
            shard = self.manifest["shards"][number]
            self._check(shard)
            file = self.path / shard["file"]
            with open(file, "rb") as stream:  # safetensors: 8 bytes of header length, the header, the data
                length = int.from_bytes(stream.read(8), "little")
                start = 8 + length + json.loads(stream.read(length))["tokens"]["data_offsets"][0]
            self._maps[number] = np.memmap(file, dtype="<i4", mode="r", offset=start, shape=(shard["sequences"], self.context))
        return self._maps[number]

    def _rows(self, i: int, j: int) -> np.ndarray:
        if not 0 <= i <= j <= self.n_sequences:
            raise IndexError(f"sequences {i} to {j} of a dataset of {self.n_sequences}")
        stored = self._order[i:j]
        size = self.manifest["shards"][0]["sequences"]
        rows = np.empty((j - i, self.context), dtype=np.int32)
        for number in np.unique(stored // size):
            mine = stored // size == number
            rows[mine] = self._shard(int(number))[stored[mine] % size]
        return rows

    def tokens(self, i: int, j: int) -> Tensor:
        """int64 [j - i, context], sequences i to j in the order of use."""
        import torch

        return torch.from_numpy(self._rows(i, j).astype(np.int64))

    def keep(self, i: int, j: int) -> Tensor:
        """bool [j - i, context]; False at tokens that are excluded."""
        import torch

        return torch.from_numpy(~np.isin(self._rows(i, j), self._excluded))

    def kept(self, i: int, j: int) -> int:
        """Rows of sequences i to j that are not excluded, without reading tokens."""
        return int(self._kept[self._order[i:j]].sum())

    # Language-model batches: calibration sequences and training sequences never share one, so that each batch is a fixed set of sequences.

    def calibration_batches(self, lm_batch: int) -> int:
        """Batches of calibration sequences; they come first."""
        return -(-self.calibration_sequences // lm_batch)

    def n_batches(self, lm_batch: int) -> int:
        """All batches of one epoch, calibration included; the last one of each kind may be short."""
        return self.calibration_batches(lm_batch) - (-(self.n_sequences - self.calibration_sequences) // lm_batch)

    def batch_range(self, batch: int, lm_batch: int) -> tuple[int, int]:
        """Sequences (i, j) of batch `batch`."""
        if not 0 <= batch < self.n_batches(lm_batch):
            raise IndexError(f"batch {batch} of {self.n_batches(lm_batch)}")
        before = self.calibration_batches(lm_batch)
        first, end = (0, self.calibration_sequences) if batch < before else (self.calibration_sequences, self.n_sequences)
        i = first + (batch if batch < before else batch - before) * lm_batch
        return i, min(i + lm_batch, end)
