"""A SAELens checkpoint folder in, an SAE out, and back: only `run` imports sae_lens."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE
from saehub.errors import CheckFailed, FormatError
from saehub_saelens import training
from saehub_saelens.mapping import Foreign, Unsayable, from_saelens, to_saelens

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
MAX_CONFIG_BYTES = 64 * 2**20


class SAELensFormat:
    """The exporter `saelens`."""

    files = (CONFIG, WEIGHTS)

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        """A folder with both files, and a cfg.json that speaks of an SAE."""
        path = Path(path)
        try:
            if not (path / WEIGHTS).is_file() or (path / CONFIG).stat().st_size > MAX_CONFIG_BYTES:
                return False
            config = json.loads((path / CONFIG).read_bytes())
            return isinstance(config, dict) and {"d_in", "d_sae"} <= config.keys()
        except (OSError, ValueError, RecursionError):
            return False

    def read(self, path: Path) -> SAE:
        """The SAE, its tensors bit-exact as stored (a training checkpoint's with its activation scaler folded in, see `folds`); FormatError
        for damage, and for what saehub cannot express, with the reason. A trainer_state.pt is never opened."""
        from saehub.checkpoint.format import read_tensors
        from saehub.checkpoint.stream import count_bad

        path = Path(path)
        config = _read_config(path / CONFIG)
        tensors = read_tensors(path / WEIGHTS)
        for name, tensor in tensors.items():
            bad = count_bad(tensor, allow_infinite=name in ("threshold", "log_threshold"))
            if bad:
                raise FormatError(
                    f"{path / WEIGHTS}: {name} holds {bad} values that are NaN or infinite",
                    fix="restore the folder from where it came",
                )
        try:
            return from_saelens(Foreign(config, tensors, _scaler(path, config, tensors)))
        except FormatError as error:
            raise FormatError(f"{path}: {error.what}", where=error.where, why=error.why, fix=error.fix or RESTORE) from error

    def folds(self, path: Path) -> list[str]:
        """What `read` folds into the tensors of this folder: nothing, unless it is a training checkpoint."""
        from safetensors import safe_open
        from saehub_saelens.legacy import upgrade

        path = Path(path)
        config = _read_config(path / CONFIG)
        with safe_open(path / WEIGHTS, framework="pt") as stream:
            names = set(stream.keys())
        scaler = _scaler(path, config, names)
        return training.folds(upgrade(config), scaler, names) if scaler is not None else []

    def refusal(self, sae: SAE) -> str | None:
        """Why SAELens cannot say this SAE, or None if it can."""
        try:
            to_saelens(sae)
        except Unsayable as reason:
            return str(reason)
        return None

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write `cfg.json` and `sae_weights.safetensors` into the folder `path`; CheckFailed for what SAELens cannot say."""
        from saehub.checkpoint.format import write_tensors
        from saehub.jsonio import write_text_atomic

        path = Path(path)
        try:
            foreign = to_saelens(sae)
        except Unsayable as reason:
            raise CheckFailed("SAELens cannot say this SAE", why=str(reason), fix="saehub's own format can") from reason
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / WEIGHTS, foreign.tensors)
        write_text_atomic(path / CONFIG, json.dumps(foreign.config, indent=1, allow_nan=False) + "\n")
        return {"folded": foreign.folded, "dropped": foreign.dropped, "side_channel": foreign.side_channel, "bit_exact": foreign.bit_exact}

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d_out] of rows [n, d_in], by sae_lens itself with its weights as float32."""
        from saehub_saelens.library import run

        return run(Path(path), x_ND)


def _scaler(path: Path, config: dict[str, Any], names: Container[str]) -> training.Scaler | None:
    """For a training checkpoint, what its trainer did to the activations; else None."""
    if not (training.is_training(path, config) or "log_threshold" in names):
        return None
    return training.read_scaler(path, config)


def _read_config(file: Path) -> dict[str, Any]:
    from saehub.jsonio import read_json

    if file.is_file() and file.stat().st_size > MAX_CONFIG_BYTES:
        raise FormatError(f"{file} has {file.stat().st_size} bytes", why="no SAELens config is that long")
    try:
        config = read_json(file)
    except RecursionError as error:
        raise FormatError(f"{file} is nested too deeply", fix="restore the folder from where it came") from error
    if not isinstance(config, dict):
        raise FormatError(f"{file} is a {type(config).__name__}", why="expected a map with architecture, d_in, d_sae")
    return config
