"""A Goodfire file (`Llama-3.1-8B-Instruct-SAE-l19.pth`) in, an SAE out.

| entry | shape | here |
|---|---|---|
| encoder_linear.weight | [d_sae, d] | W_enc, transposed |
| encoder_linear.bias | [d_sae] | b_enc |
| decoder_linear.weight | [d, d_sae] | W_dec, transposed |
| decoder_linear.bias | [d] | b_dec |

    p = x W_encᵀ + b_enc;   f = max(p, 0);   x̂ = f W_decᵀ + b_dec                (b_dec is not subtracted; nothing is normalised)

Model and layer stand only in the file's name; `l19` is the output of `model.layers.19` (the publisher's demo hooks that module). A
config.yaml beside is carried verbatim. Sources: the model card and demo notebook, SAELens' loader and its test against the demo's class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, check_shapes
from saehub.errors import FormatError
from saehub_formats.common import ReadOnly, build, combine, multiply, sites
from saehub_formats.files import first_file, one_file, read_torch, read_yaml, torch_words

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT = "goodfire"
KEYS = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
PATTERN = "*.pt*"
_NAME = re.compile(r"(.+)-SAE-l(\d+)\.pth?")


class Goodfire(ReadOnly):
    """The exporter `goodfire`: a .pt or .pth file, or a folder with one."""

    publication = "Goodfire's files"

    def sniff(self, path: Path) -> bool:
        """A torch file with the four names (looked up without unpickling)."""
        return torch_words(first_file(Path(path), PATTERN)) >= set(KEYS)

    def read(self, path: Path) -> SAE:
        """The SAE, tensors bit-exact (matrices transposed); FormatError for damage."""
        from saehub.checkpoint.config import SAEConfig

        file = one_file(Path(path), PATTERN, "a Goodfire SAE")
        stored = read_torch(file)
        encoder = stored.get(KEYS[0])
        if getattr(encoder, "ndim", 0) != 2:
            raise FormatError(f"{file} has no matrix {KEYS[0]}", why=f"it holds {', '.join(stored) or 'nothing'}", fix=RESTORE)
        d_sae, d = encoder.shape
        check_shapes(file, stored, dict(zip(KEYS, ((d_sae, d), (d_sae,), (d, d_sae), (d,)), strict=True)))
        ours = {
            "W_enc": stored["encoder_linear.weight"].T.contiguous(),
            "b_enc": stored["encoder_linear.bias"],
            "W_dec": stored["decoder_linear.weight"].T.contiguous(),
            "b_dec": stored["decoder_linear.bias"],
        }
        beside = file.with_name("config.yaml")
        origin: dict[str, Any] = {"format": FORMAT, "config": read_yaml(beside) if beside.is_file() else {}, "file": file.name}
        about: dict[str, Any] = {}
        if match := _NAME.fullmatch(file.name):
            about = {**sites(f"model.layers.{match[2]}", family="llama"), "model": {"name": match[1]}}
        return build(file, SAEConfig("relu", d, d_sae, subtract_b_dec=False), ours, {**about, "origin": origin})

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d] of rows [n, d]: the published equation in float64, rounded once."""
        stored = read_torch(one_file(Path(path), PATTERN, "a Goodfire SAE"))
        f_NF = (multiply(x_ND, stored["encoder_linear.weight"].T) + stored["encoder_linear.bias"].double()).clamp(min=0)
        y_ND = combine(f_NF, stored["decoder_linear.weight"].T) + stored["decoder_linear.bias"].double()
        return f_NF.float(), y_ND.float()
