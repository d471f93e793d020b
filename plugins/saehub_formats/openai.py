"""An openai/sparse_autoencoder file (`6.pt`) in, an SAE out (Gao et al. 2024, arXiv 2406.04093).

    gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt

| entry | shape | here |
|---|---|---|
| pre_bias | [d] | b_dec |
| encoder.weight | [d_sae, d] | W_enc, transposed |
| latent_bias | [d_sae] | b_enc |
| decoder.weight | [d, d_sae] | W_dec, transposed (tied SAEs: decoder.linear.weight = encoder.weight) |
| activation, activation_state_dict (and activation.k, activation.postact_fn) | "ReLU"; "TopK", {k, postact_fn} | architecture |
| stats_last_nonzero, latents_… | [d_sae] | statistics of training; not kept |

    x' = x, or for TopK SAEs (x - μ)/(σ + 1e-5), σ with n-1
    p = (x' - pre_bias) W_encᵀ + latent_bias;   f = activation(p);   x̂ = f W_decᵀ + pre_bias, for TopK SAEs times σ plus μ

That TopK SAEs, and only they, are layer-normed is how the publisher's own loader decides. The file does not say where it reads: location
and layer stand in its path, as far as that was kept. Source: sparse_autoencoder/model.py, paths.py and README.md of the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.foreign import RESTORE, check_shapes
from saehub.errors import FormatError
from saehub_formats.common import ReadOnly, build, combine, keep_largest, multiply, sites
from saehub_formats.files import first_file, one_file, read_torch, torch_words

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

FORMAT = "openai"
KEYS = {"pre_bias", "latent_bias", "encoder.weight"}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
HOOKS = {
    "mlp_post_act": "blocks.{L}.mlp.hook_post",
    "resid_delta_attn": "blocks.{L}.hook_attn_out",
    "resid_post_attn": "blocks.{L}.hook_resid_mid",
    "resid_delta_mlp": "blocks.{L}.hook_mlp_out",
    "resid_post_mlp": "blocks.{L}.hook_resid_post",
}
_PATH = re.compile(rf"(?:([\w.-]+)/)?({'|'.join(HOOKS)})(_v\w+)?/autoencoders/(\d+)\.pt$")


class OpenAI(ReadOnly):
    """The exporter `openai`: a .pt file, or a folder with one."""

    publication = "the files of openai/sparse_autoencoder"

    def sniff(self, path: Path) -> bool:
        """A torch file whose keys are this library's (looked up without unpickling)."""
        return torch_words(first_file(Path(path), "*.pt")) >= KEYS

    def read(self, path: Path) -> SAE:
        """The SAE, tensors bit-exact (matrices transposed); FormatError for damage, and for activations that are neither ReLU nor TopK."""
        from saehub.checkpoint.config import SAEConfig

        file, stored, activation, k = _open(Path(path))
        tensors = {name: value for name, value in stored.items() if name not in STATISTICS}
        if "decoder.linear.weight" in tensors:  # tied: the decoder is the encoder, transposed
            tensors["decoder.weight"] = tensors.pop("decoder.linear.weight").T
            if not (
                tensors["decoder.weight"].shape == tensors["encoder.weight"].T.shape
                and bool((tensors["decoder.weight"] == tensors["encoder.weight"].T).all())
            ):
                raise FormatError(f"{file}: a tied decoder that is not its encoder", fix=RESTORE)
        d_sae, d = _matrix(file, tensors)
        check_shapes(file, tensors, {"pre_bias": (d,), "encoder.weight": (d_sae, d), "latent_bias": (d_sae,), "decoder.weight": (d, d_sae)})
        ours = {
            "W_enc": tensors["encoder.weight"].T.contiguous(),
            "b_enc": tensors["latent_bias"],
            "W_dec": tensors["decoder.weight"].T.contiguous(),
            "b_dec": tensors["pre_bias"],
        }
        norm = "layer_norm" if activation == "TopK" else "none"
        config = SAEConfig("topk" if k else "relu", d, d_sae, params={"k": k} if k else {}, norm_in=norm, norm_out=norm)
        origin: dict[str, Any] = {"activation": activation} | ({"activation_state_dict": {"k": k, "postact_fn": "ReLU"}} if k else {})
        return build(file, config, ours, {**_about(file, origin), "origin": {"format": FORMAT, "config": origin}})

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d] of rows [n, d]: the published equation in float64, rounded once."""
        _, stored, activation, k = _open(Path(path))
        x_ND = x_ND.double()
        mean_N1, deviation_N1 = x_ND.mean(1, keepdim=True), x_ND.std(1, keepdim=True)
        normed_ND = (x_ND - mean_N1) / (deviation_N1 + 1e-5) if activation == "TopK" else x_ND
        pre_bias_D = stored["pre_bias"].double()
        p_NF = multiply(normed_ND - pre_bias_D, stored["encoder.weight"].T) + stored["latent_bias"].double()
        f_NF = keep_largest(p_NF, k) if k else p_NF.clamp(min=0)
        y_ND = combine(f_NF, stored["decoder.weight"].T if "decoder.weight" in stored else stored["encoder.weight"]) + pre_bias_D
        return f_NF.float(), (y_ND * deviation_N1 + mean_N1 if activation == "TopK" else y_ND).float()


def _open(path: Path) -> tuple[Path, dict[str, Tensor], str, int | None]:
    """File, tensors, activation and k."""
    import torch

    file = one_file(path, "*.pt", "an openai SAE")
    stored = read_torch(file)
    activation, state = stored.pop("activation", "ReLU"), stored.pop("activation_state_dict", {})
    again = {key: stored.pop(f"activation.{key}") for key in ("k", "postact_fn") if f"activation.{key}" in stored}
    if isinstance(state, dict) and any(state.setdefault(key, value) != value for key, value in again.items()):
        raise FormatError(f"{file}: activation_state_dict is {str(state)[:100]}", why=f"the entries beside it say {again}", fix=RESTORE)
    k = state.get("k") if isinstance(state, dict) and activation == "TopK" else None
    k = int(k) if isinstance(k, torch.Tensor) and k.numel() == 1 else k
    if activation not in ("ReLU", "TopK") or (
        activation == "TopK" and state.get("postact_fn", "ReLU") != "ReLU" if isinstance(state, dict) else True
    ):
        raise FormatError(
            f"{file}: activation {activation!r} with {str(state)[:100]}",
            why="readable: ReLU, and TopK followed by ReLU",
            fix="no architecture here computes it",
        )
    if activation == "TopK" and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise FormatError(f"{file}: TopK with k {k!r}", why="expected a whole number from 1 in activation_state_dict", fix=RESTORE)
    return file, stored, activation, k


def _matrix(file: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
    found = tensors.get("encoder.weight")
    if found is None or found.ndim != 2:
        raise FormatError(f"{file} has no matrix encoder.weight", why=f"it holds {', '.join(tensors) or 'nothing'}", fix=RESTORE)
    return found.shape[0], found.shape[1]


def _about(file: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Model and site, as far as the path says them the way the publisher's storage does."""
    match = _PATH.search(file.absolute().as_posix())
    if not match:
        return {}
    model, location, version, layer = match.groups()
    origin["path"] = match[0]
    found: dict[str, Any] = sites(HOOKS[location].format(L=layer))
    return found | ({"model": {"name": model}} if model and version is not None or model == "gpt2-small" else {})
