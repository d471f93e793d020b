"""A Gemma Scope folder (`params.npz`) in, an SAE out, and back (Lieberum et al. 2024, arXiv 2408.05147).

    layer_20/width_16k/average_l0_71/params.npz            in google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders}

| array | shape | here |
|---|---|---|
| W_enc | [d_in, d_sae] | W_enc |
| b_enc | [d_sae] | b_enc |
| threshold | [d_sae] | threshold |
| W_dec | [d_sae, d_out] | W_dec |
| b_dec | [d_out] | b_dec |

    p = x W_enc + b_enc;   f = [p > θ] max(p, 0);   x̂ = f W_dec + b_dec        (b_dec is not subtracted; nothing is normalised)

The file names neither model nor site: they stand in the folder's path, as far as it was kept. Transcoders have the same arrays, and read the
normed MLP input before its gain (`ln2.hook_normalized`), which no module holds: it is carried as `unknown_site`. Arrays may be called w_enc
and w_dec, and a `scaling_factor` of ones may stand beside. Sources: the tutorial linked from the model card, SAELens' loader of this layout.

What the arrays cannot say (kind, architecture, provenance, 16-bit dtypes) is written to `params.saehub.json`, which is believed only if it
describes these very arrays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, SIDE_CHANNEL, Foreign, Unsayable, check_shapes, read_config, restore
from saehub.errors import CheckFailed, FormatError, SaehubError
from saehub_formats.common import build, combine, multiply, sites
from saehub_formats.files import npz_names, read_npz, write_npz
from saehub_formats.jump import fold_to_jumprelu

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT, WEIGHTS, SIDE = "gemma_scope", "params.npz", "params.saehub.json"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
HOOKS = {"res": ("blocks.{L}.hook_resid_post", None), "mlp": ("blocks.{L}.hook_mlp_out", None), "att": ("blocks.{L}.attn.hook_z", None),
         "transcoders": ("blocks.{L}.ln2.hook_normalized", "blocks.{L}.hook_mlp_out")}  # fmt: skip


class GemmaScope:
    """The exporter `gemma_scope`: a folder with params.npz, or that file."""

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        """A params.npz with the five arrays."""
        return {_ours(name) for name in npz_names(_file(Path(path)))} >= set(NAMES)

    def read(self, path: Path) -> SAE:
        """The SAE, arrays bit-exact; FormatError for damage, pickled arrays and a scaling_factor other than one."""
        file = _file(Path(path))
        side = _beside(file)
        foreign = Foreign(side, read_npz(file), side.get(SIDE_CHANNEL))
        plain = _read_plainly(foreign, file)
        return restore(foreign, plain, to_gemma_scope) or plain

    def refusal(self, sae: SAE) -> str | None:
        """Why the layout cannot say this SAE, or None."""
        try:
            to_gemma_scope(sae)
        except Unsayable as reason:
            return str(reason)
        return None

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write params.npz and params.saehub.json into the folder `path`; CheckFailed for what the layout cannot say."""
        from saehub.jsonio import write_json_atomic

        path = Path(path)
        try:
            foreign = to_gemma_scope(sae)
        except Unsayable as reason:
            raise CheckFailed("Gemma Scope's layout cannot say this SAE", why=str(reason), fix="saehub's own format can") from reason
        path.mkdir(parents=True, exist_ok=True)
        write_npz(path / WEIGHTS, foreign.tensors)
        write_json_atomic(path / SIDE, foreign.config)
        return foreign.notes()

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d_out] of rows [n, d_in]: the published equation in float64, rounded once."""
        arrays = {name.lower(): array for name, array in read_npz(_file(Path(path))).items()}
        p_NF = multiply(x_ND, arrays["w_enc"]) + arrays["b_enc"].double()
        f_NF = p_NF.clamp(min=0) * (p_NF > arrays["threshold"].double())
        return f_NF.float(), (combine(f_NF, arrays["w_dec"]) + arrays["b_dec"].double()).float()


def _file(path: Path) -> Path:
    return path if path.is_file() else path / WEIGHTS


def _ours(name: str) -> str:
    return "W_" + name[2:] if name.startswith("w_") else name


def _beside(file: Path) -> dict[str, Any]:
    """The side channel, if there is one that can be read: the arrays mean the same without it."""
    side = file.with_name(SIDE)
    try:
        return {key: value for key, value in read_config(side).items() if key == SIDE_CHANNEL} if side.is_file() else {}
    except SaehubError:
        return {}


def _read_plainly(foreign: Foreign, file: Path) -> SAE:
    from saehub.checkpoint.config import SAEConfig

    arrays = {_ours(name): array for name, array in foreign.tensors.items()}
    about = _about(file)
    odd = sorted(name for name in foreign.tensors if name != _ours(name))
    origin: dict[str, Any] = {"format": FORMAT, "config": about["config"]} | ({"lower_case": odd} if odd else {})
    factor = arrays.pop("scaling_factor", None)
    if factor is not None:
        if not bool((factor == 1).all()):
            raise FormatError(
                f"{file}: scaling_factor is not 1", why="no published equation says where it belongs", fix="use an SAE without one"
            )
        origin["unit_scaling_factor"] = {"dtype": str(factor.dtype).removeprefix("torch."), "shape": list(factor.shape)}
    if "W_enc" not in arrays or "W_dec" not in arrays or arrays["W_enc"].ndim != 2 or arrays["W_dec"].ndim != 2:
        raise FormatError(
            f"{file} holds {', '.join(foreign.tensors) or 'nothing'}",
            why=f"expected {', '.join(NAMES)}, W_enc and W_dec as matrices",
            fix=RESTORE,
        )
    (d_in, d_sae), d_out = arrays["W_enc"].shape, arrays["W_dec"].shape[1]
    check_shapes(
        file, arrays, {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "threshold": (d_sae,)}
    )
    kind = "transcoder" if about["site"] == "transcoders" or d_in != d_out else "autoencoder"
    config = SAEConfig("jumprelu", d_in, d_sae, d_out=d_out, kind=kind, subtract_b_dec=False)
    return build(file, config, arrays, {**about["provenance"], "origin": origin})


def _about(file: Path) -> dict[str, Any]:
    """Model, site and layer, as far as the path says them the way the publisher's repositories do."""
    text = file.absolute().parent.as_posix()
    repository = re.findall(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)(?![\w-])", text)
    folder = re.search(r"((?:layer_(\d+)|embedding)/width_\w+(?:/[\w.-]+)?)$", text)
    found: dict[str, Any] = {"config": {"file": WEIGHTS}, "site": None, "provenance": {}}
    if folder:
        found["config"]["folder"] = folder[1]
    if repository:
        size, tuned, found["site"] = repository[-1]
        found["config"]["repository"] = f"gemma-scope-{size}-{tuned}-{found['site']}"
        found["provenance"]["model"] = {"name": f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")}
        if folder and folder[2]:
            hooks = (hook and hook.format(L=folder[2]) for hook in HOOKS[found["site"]])
            found["provenance"] |= sites(*hooks)
        elif folder:
            found["provenance"]["unknown_site"] = "embedding"  # scaled by √d_model or not: libraries disagree
    return found


def to_gemma_scope(sae: SAE) -> Foreign:
    """Arrays and side channel; raises Unsayable with the reason."""
    import torch

    if sae.config.skip:
        raise Unsayable("Gemma Scope's layout has no skip path")
    foreign = fold_to_jumprelu(sae)
    wide = {name: str(t.dtype).removeprefix("torch.") for name, t in foreign.tensors.items() if t.dtype == torch.bfloat16}
    if wide:  # numpy has no bfloat16
        foreign.tensors = {name: t.float() if name in wide else t for name, t in foreign.tensors.items()}
        foreign.side_channel.append(f"bfloat16 of {', '.join(wide)} (float32 in the file, exactly)")
        # a tensor that our own SAE does not have (θ = 0 of a relu, θ of every latent) needs no way back
        foreign.config[SIDE_CHANNEL]["dtypes"] = {
            name: word for name, word in wide.items() if name in sae.tensors() and sae.tensors()[name].shape == foreign.tensors[name].shape
        }
    origin = sae.provenance.get("origin")
    origin = origin if isinstance(origin, dict) and origin.get("format") == FORMAT else {}
    names = {_ours(name): name for name in origin.get("lower_case", ())}
    foreign.tensors = {names.get(name, name): foreign.tensors[name] for name in NAMES}
    if origin.get("unit_scaling_factor"):
        unit = origin["unit_scaling_factor"]
        foreign.tensors["scaling_factor"] = torch.ones(unit["shape"], dtype=getattr(torch, unit["dtype"]))
    return foreign
