"""A dictionary_learning folder in, an SAE out, and back: only `run` imports dictionary_learning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, SIDE_CHANNEL, Unsayable, folds_of, is_map_with, read_config, unit_rows
from saehub.errors import Caution, CheckFailed, FormatError
from saehub_dictionary_learning import pickled
from saehub_dictionary_learning.mapping import from_dictionary_learning, stored, to_dictionary_learning

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
SHOWN = 30
"""Dictionaries of a run that an error lists."""


class DictionaryLearningFormat:
    """The exporter `dictionary_learning`: one trainer's folder, or a file `checkpoints/ae_<step>.pt` in it."""

    files = (CONFIG, WEIGHTS)

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        """ae.pt (or a .pt file) and a config.json with `trainer.dict_class`."""
        try:
            file, config = _files(Path(path))
            return file.is_file() and is_map_with(config, {"trainer"}) and "dict_class" in read_config(config)["trainer"]
        except (OSError, TypeError, FormatError):
            return False

    def read(self, path: Path) -> SAE:
        """The SAE, tensors as stored (of a backup: in raw units); FormatError for damage, and for what saehub cannot express."""
        file, config, found = _load(Path(path))
        try:
            return from_dictionary_learning(config, found, file)
        except FormatError as error:
            where = "" if str(path) in error.what else f"{path}: "
            raise FormatError(f"{where}{error.what}", where=error.where, why=error.why, fix=error.fix or RESTORE, said=error.said) from error

    def folds(self, path: Path) -> list[str]:
        """What `read` folds into the tensors of this folder: nothing, unless it is a backup for rows divided by a norm."""
        _, config, found = _load(Path(path))
        return folds_of(self, path, config) if isinstance(found.get("ae"), Mapping) else []

    def refusal(self, sae: SAE) -> str | None:
        """Why dictionary_learning cannot say this SAE, or None if it can."""
        try:
            to_dictionary_learning(sae)
        except Unsayable as reason:
            return str(reason)
        return None

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write `config.json` and `ae.pt` into the folder `path`; CheckFailed for what dictionary_learning cannot say."""
        from saehub.jsonio import write_text_atomic

        path = Path(path)
        try:
            foreign = to_dictionary_learning(sae)
        except Unsayable as reason:
            raise CheckFailed("dictionary_learning cannot say this SAE", why=str(reason), fix="saehub's own format can") from reason
        if foreign.config["trainer"]["dict_class"] == "AutoEncoder" and not unit_rows(foreign.tensors["decoder.weight"].T):
            words = f"{path}: decoder rows have lengths other than 1: load_dictionary multiplies the features of an AutoEncoder by them"
            warnings.warn(f"{words}; from_pretrained(normalize_decoder=False) does not", Caution, stacklevel=2)
        path.mkdir(parents=True, exist_ok=True)
        pickled.save(path / WEIGHTS, foreign.tensors)
        config = foreign.config | ({SIDE_CHANNEL: foreign.beside} if foreign.beside else {})
        write_text_atomic(path / CONFIG, json.dumps(config, indent=4, allow_nan=False) + "\n")
        return foreign.notes()

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d_in] of rows [n, d_in], by dictionary_learning itself with its weights as float32."""
        from saehub_dictionary_learning import library

        file, config, found = _load(Path(path))
        content = stored(config, found, file)
        return library.run(library.build(content.dict_class, content.sizes, content.state, content.norm_factor), x_ND)


def _files(path: Path) -> tuple[Path, Path]:
    """The weights and the config that belong to a path."""
    if path.suffix == ".pt" and path.is_file():
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return path, folder / CONFIG
    return path / WEIGHTS, path / CONFIG


def _load(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The weights' file, the config, and the map in the file."""
    file, config = _files(path)
    if path.is_dir() and not file.is_file() and not config.is_file():
        inside = sorted(
            str(found.parent.relative_to(path)) for pattern in ("*", "*/*", "*/*/*") for found in path.glob(f"{pattern}/{WEIGHTS}")
        )
        listed = ", ".join(inside[:SHOWN]) + (" …" if len(inside) > SHOWN else "")
        raise FormatError(
            f"{path} is not a dictionary_learning folder",
            why=f"it has neither {WEIGHTS} nor {CONFIG}",
            fix=f"name one of those inside it: {listed}" if inside else "name a trainer's folder, such as RUN/trainer_0",
        )
    found = pickled.load(file)
    if not config.is_file() and isinstance(found.get("config"), dict):  # a backup carries its trainer's config
        return file, {"trainer": found["config"]}, found
    return file, read_config(config), found
