"""A Qwen-Scope file (`layer12.sae.pt`) in, an SAE out (Qwen team 2026, arXiv 2605.11887).

    layer0.sae.pt … layer27.sae.pt, README.md           in Qwen/SAE-Res-{model}-W{width}K-L0_{k}

| entry | shape | here |
|---|---|---|
| W_enc | [d_sae, d] | W_enc, transposed |
| b_enc | [d_sae] | b_enc |
| W_dec | [d, d_sae] | W_dec, transposed |
| b_dec | [d] | b_dec |

    p = x W_encᵀ + b_enc;   f = max(p, 0) on the k largest p, 0 elsewhere;   x̂ = f W_decᵀ + b_dec           (b_dec is not subtracted)

k is in no file but the model card (`| Top-K | 50 |`) and the repository's name (`L0_50`); one of them must be at hand, and both must agree.
`layer12` is the residual stream after block 12 (SAELens registers `model.layers.12`). k is so small against d_sae that kept p are positive:
whether a ReLU follows makes no difference. Sources: the model cards, SAELens' loader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, check_shapes
from saehub.errors import FormatError
from saehub_formats.common import ReadOnly, build, combine, keep_largest, multiply, sites
from saehub_formats.files import MAX_TEXT_BYTES, first_file, one_file, read_torch, torch_words

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT, CARD, PATTERN = "qwen_scope", "README.md", "layer*.sae.pt"
KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")
_REPOSITORY = re.compile(r"SAE-Res-([\w.-]+?)-W(\d+)K-L0_(\d+)")
_LAYER = re.compile(r"layer(\d+)\.sae\.pt")


class QwenScope(ReadOnly):
    """The exporter `qwen_scope`: one layer's file, or a folder with one."""

    publication = "Qwen-Scope"

    def sniff(self, path: Path) -> bool:
        """A `layer*.sae.pt` with the four names (looked up without unpickling)."""
        return torch_words(first_file(Path(path), PATTERN)) >= set(KEYS)

    def read(self, path: Path) -> SAE:
        """The SAE, tensors bit-exact (matrices transposed); FormatError for damage, and where nothing says k."""
        from saehub.checkpoint.config import SAEConfig

        file = one_file(Path(path), PATTERN, "a Qwen-Scope SAE")
        k, about, origin = _about(file)
        stored = read_torch(file)
        encoder = stored.get("W_enc")
        if getattr(encoder, "ndim", 0) != 2:
            raise FormatError(f"{file} has no matrix W_enc", why=f"it holds {', '.join(stored) or 'nothing'}", fix=RESTORE)
        d_sae, d = encoder.shape
        check_shapes(file, stored, {"W_enc": (d_sae, d), "b_enc": (d_sae,), "W_dec": (d, d_sae), "b_dec": (d,)})
        ours = stored | {name: stored[name].T.contiguous() for name in ("W_enc", "W_dec")}
        return build(
            file,
            SAEConfig("topk", d, d_sae, params={"k": k}, subtract_b_dec=False),
            ours,
            {**about, "origin": {"format": FORMAT, "config": origin}},
        )

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d] of rows [n, d]: the published equation in float64, rounded once."""
        file = one_file(Path(path), PATTERN, "a Qwen-Scope SAE")
        stored, k = read_torch(file), _about(file)[0]
        f_NF = keep_largest(multiply(x_ND, stored["W_enc"].T) + stored["b_enc"].double(), k)
        return f_NF.float(), (combine(f_NF, stored["W_dec"].T) + stored["b_dec"].double()).float()


def _about(file: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """k, provenance, and what was read off card and path; FormatError if k is said nowhere, or twice and differently."""
    origin: dict[str, Any] = {"file": file.name}
    about: dict[str, Any] = {}
    if match := _LAYER.fullmatch(file.name):
        about = sites(f"model.layers.{match[1]}", family="llama")
    repository = _REPOSITORY.findall(file.absolute().parent.as_posix())
    said: dict[str, int] = {}
    if repository:
        model, width, k = repository[-1]
        origin["repository"] = f"SAE-Res-{model}-W{width}K-L0_{k}"
        about["model"], said["the folder's name"] = {"name": f"Qwen/{model}"}, int(k)
    card = file.with_name(CARD)
    if card.is_file() and card.stat().st_size <= MAX_TEXT_BYTES:
        rows = dict(
            re.findall(r"^\|\s*([^|\n]+?)\s*\|\s*([^|\n]+?)\s*\|\s*$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        )
        if rows.get("Top-K", "").isdigit():
            said[CARD], origin["card"] = (
                int(rows["Top-K"]),
                {key: rows[key] for key in ("Base model", "Top-K", "Hook point") if key in rows},
            )
    if not said:
        why = f"k stands in the model card ({CARD}: | Top-K | … |) and in the repository's name (SAE-Res-…-L0_50), and neither is here"
        raise FormatError(
            f"{file}: how many latents a row keeps is said nowhere", why=why, fix=f"put the repository's {CARD} beside the file"
        )
    if len(set(said.values())) > 1:
        raise FormatError(
            f"{file}: k is {' and '.join(f'{k} in {where}' for where, k in said.items())}",
            fix=f"put the {CARD} of the file's own repository beside it",
        )
    return next(iter(said.values())), about, origin
