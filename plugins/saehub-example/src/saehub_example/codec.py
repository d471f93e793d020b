"""A folder of `.npy` arrays with `folio.json` in, an SAE out, and back: a house format of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehub import SAE, FormatError, SAEConfig, UsageError
from saehub_example import ARCHITECTURE  # only with: trainer

SAYABLE = (
    "relu",
    "topk",
    ARCHITECTURE,  # only with: trainer
)
"""Architectures that the format knows."""
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
MARK = "folio/1"


class Folio:
    """Implements `saehub.api.Exporter`: `W_enc.npy` [d_in, d_sae], `b_enc.npy`, `W_dec.npy`, `b_dec.npy`, and what they mean."""

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        """Whether folio.json says so; never raises on a foreign folder."""
        try:
            return json.loads((Path(path) / "folio.json").read_text(encoding="utf-8"))["format"] == MARK
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read(self, path: Path) -> SAE:
        """The SAE, bit-exact; FormatError names the file that is damaged."""
        about = self._about(path)
        config = SAEConfig(about["architecture"], about["d_in"], about["d_sae"], params=about["params"])
        return SAE.build(config, {name: torch.from_numpy(self._array(path, name)) for name in NAMES}, about["provenance"])

    def refusal(self, sae: SAE) -> str | None:
        """Why this SAE cannot be said, or None: asked before any work."""
        c = sae.config
        if c.architecture not in SAYABLE:
            return f"folio knows {', '.join(SAYABLE)}, not {c.architecture}"
        if (c.kind, c.norm_in, c.subtract_b_dec, c.decoder_norm_scaling) != ("autoencoder", "none", True, False):
            return "folio knows plain autoencoders that subtract b_dec, without run-time norms"
        wide = [name for name, tensor in sae.tensors().items() if tensor.dtype == torch.bfloat16]
        return f"numpy has no bfloat16, the dtype of {', '.join(wide)}" if wide else None

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write the folder, folio.json last: its presence means complete."""
        reason = self.refusal(sae)
        if reason:
            raise UsageError("this SAE cannot be written as a folio", why=reason, fix="saehub's own format can say it: --to saehub")
        path, c = Path(path), sae.config
        path.mkdir(parents=True, exist_ok=True)
        for name, tensor in sae.tensors().items():
            np.save(path / f"{name}.npy", tensor.numpy(), allow_pickle=False)
        about = {"format": MARK, "architecture": c.architecture, "params": dict(c.params), "d_in": c.d_in, "d_sae": c.d_sae}
        text = json.dumps({**about, "provenance": dict(sae.provenance)}, indent=1, allow_nan=False)
        (path / "folio.json").write_text(text + "\n", encoding="utf-8")
        return {"bit_exact": list(NAMES), "folded": [], "dropped": []}

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features and reconstruction by the format's own equation, in float64 numpy, apart from saehub's code."""
        about, t = self._about(path), {name: self._array(path, name).astype(np.float64) for name in NAMES}
        p_NF = (x_ND.double().numpy() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        f_NF = np.maximum(p_NF, 0)
        if about["architecture"] == "topk":
            others = np.argsort(-p_NF, axis=1, kind="stable")[:, int(about["params"]["k"]) :]
            np.put_along_axis(f_NF, others, 0.0, axis=1)
        elif about["architecture"] == ARCHITECTURE:  # only with: trainer
            f_NF *= p_NF >= about["params"]["tau"] * np.maximum(p_NF.max(1, keepdims=True), 0)  # only with: trainer
        return torch.from_numpy(f_NF).float(), torch.from_numpy(f_NF @ t["W_dec"] + t["b_dec"]).float()

    @staticmethod
    def _about(path: Path) -> dict[str, Any]:
        file = Path(path) / "folio.json"
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            if about["format"] != MARK or about["architecture"] not in SAYABLE:
                raise ValueError(f"{about['format']!r} with architecture {about['architecture']!r}")
            return {key: about[key] for key in ("architecture", "params", "d_in", "d_sae", "provenance")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{file} cannot be read", why=f"{type(error).__name__}: {error}", fix="export the SAE again") from error

    @staticmethod
    def _array(path: Path, name: str) -> np.ndarray:
        file = Path(path) / f"{name}.npy"
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise FormatError(f"{file} cannot be read", why=f"{type(error).__name__}: {error}", fix="export the SAE again") from error
