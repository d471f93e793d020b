"""A Sparsify checkpoint folder in, an SAE out, and back: only `run` imports sparsify."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, SIDE_CHANNEL, Foreign, Unsayable, folds_of, is_map_with, read_config
from saehub.errors import CheckFailed, FormatError
from saehub_sparsify import names
from saehub_sparsify.mapping import from_sparsify, to_sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SHOWN = 30
"""Hookpoints of a run that an error lists."""


class SparsifyFormat:
    """The exporter `sparsify`: one hookpoint's folder, or a run's folder that holds a single one."""

    files = (CONFIG, WEIGHTS)

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        """A folder with both files and a cfg.json that speaks of d_in, or a run's folder (`config.json` with `sae`) with such folders inside."""
        path = Path(path)
        try:
            return _is_checkpoint(path) or (is_map_with(path / names.RUN_CONFIG, {"sae"}) and bool(_inside(path)))
        except OSError:
            return False

    def read(self, path: Path) -> SAE:
        """The SAE, tensors as stored; FormatError for damage, for what saehub cannot express, and for a run with several hookpoints."""
        from saehub.checkpoint.format import read_tensors

        folder = locate(path)
        config, tensors = read_config(folder / CONFIG), read_tensors(folder / WEIGHTS)
        try:
            return from_sparsify(Foreign(config, tensors, _beside(folder / WEIGHTS)), folder)
        except FormatError as error:
            where = "" if str(folder) in error.what else f"{folder}: "
            raise FormatError(f"{where}{error.what}", where=error.where, why=error.why, fix=error.fix or RESTORE) from error

    def folds(self, path: Path) -> list[str]:
        """What `read` folds into the tensors of this folder: nothing, unless its encoder subtracts b_dec beside a skip path or as a transcoder."""
        config = read_config(locate(path) / CONFIG)
        may_fold = config.get("skip_connection") or "transcode" not in config
        return folds_of(self, path, config) if may_fold else []

    def refusal(self, sae: SAE) -> str | None:
        """Why Sparsify cannot say this SAE, or None if it can."""
        try:
            to_sparsify(sae)
        except Unsayable as reason:
            return str(reason)
        return None

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write `cfg.json` and `sae.safetensors` into the folder `path`; CheckFailed for what Sparsify cannot say."""
        from saehub.checkpoint.format import write_tensors
        from saehub.jsonio import write_text_atomic

        path = Path(path)
        try:
            foreign = to_sparsify(sae)
        except Unsayable as reason:
            raise CheckFailed("Sparsify cannot say this SAE", why=str(reason), fix="saehub's own format can") from reason
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(
            path / WEIGHTS, foreign.tensors, {SIDE_CHANNEL: json.dumps(foreign.beside, allow_nan=False)} if foreign.beside else None
        )
        write_text_atomic(path / CONFIG, json.dumps(foreign.config, allow_nan=False) + "\n")
        return foreign.notes()

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d_in] of rows [n, d_in], by sparsify itself with its weights as float32."""
        from saehub_sparsify.library import run

        return run(locate(path), x_ND)


def locate(path: Path) -> Path:
    """The folder of the one hookpoint that `path` is or holds; FormatError that lists them if there are several."""
    path = Path(path)
    if (path / CONFIG).exists() or (path / WEIGHTS).exists():
        return path
    inside = _inside(path)
    if len(inside) == 1:
        return inside[0]
    if not inside:
        raise FormatError(f"{path} is not a Sparsify checkpoint", why=f"it has neither {CONFIG} nor {WEIGHTS}, nor a folder that has both")
    listed = ", ".join(str(folder.relative_to(path)) for folder in inside[:SHOWN]) + (" …" if len(inside) > SHOWN else "")
    raise FormatError(
        f"{path} holds {len(inside)} Sparsify checkpoints, not one",
        why="a run's folder has one folder a hookpoint (and seed), and copies of the best ones under best/",
        fix=f"name one of those inside it: {listed}",
    )


def _beside(weights: Path) -> Any:
    """What `write` put into the header; None if there is nothing that can be read."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as stream:
        words = (stream.metadata() or {}).get(SIDE_CHANNEL)
    try:
        return json.loads(words) if words else None
    except (ValueError, RecursionError):
        return None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and is_map_with(folder / CONFIG, {"d_in"})


def _inside(path: Path) -> list[Path]:
    """Checkpoints of a run, those of best/ last: `layers.3`, `layers.3/seed1`, `best/layers.3/layers.3`, `best/layers.3/layers.3/seed1`."""
    patterns = [f"{prefix}*/{seed}{CONFIG}" for prefix in ("", "best/", "best/*/") for seed in ("", "seed*/")]
    found = {file.parent for pattern in patterns for file in path.glob(pattern)} if path.is_dir() else set()
    return sorted((folder for folder in found if _is_checkpoint(folder)), key=lambda folder: _natural(folder.relative_to(path)))


def _natural(path: Path) -> tuple:
    import re

    words = [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", str(path))]
    return path.parts[0] == "best", [(isinstance(word, str), word) for word in words]
