"""An architecture's name and a seed in; random sparse autoencoders that use its whole equation out, with rows that exercise them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from saehub.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

D_IN, D_SAE, K = 16, 48, 6
PARAMS: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "abstopk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka": {"k": K},
    "groupmax": {"k": K},
    "matching_pursuit": {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False},
}
"""Parameters of the built-in architectures that have some."""
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "b_dec not subtracted": {"subtract_b_dec": False},
    "decoder norms": {"decoder_norm_scaling": True},
    "constant norm": {"norm_in": "constant_norm_rescale", "norm_out": "constant_norm_rescale"},
    "layer norm": {"norm_in": "layer_norm", "norm_out": "layer_norm"},
    "transcoder": {"kind": "transcoder", "subtract_b_dec": False, "d_out": D_IN + 4},
    "skip transcoder": {"kind": "skip_transcoder", "subtract_b_dec": False, "d_out": D_IN + 4},
}
"""What an SAE can be besides its architecture: name -> fields of SAEConfig."""


def random_sae(
    architecture: str = "topk", *, d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 0, dtype: str = "float32", **fields: Any
) -> SAE:
    """An SAE with random tensors of the right shapes: no norm is 1, no bias 0, no threshold trivial. `fields` are SAEConfig's."""
    import torch

    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.registry import architecture as class_of

    config = SAEConfig(architecture, d_in, d_sae, **{"params": PARAMS.get(architecture, {}), **fields})
    draw = generator("random sae", architecture, d_in, d_sae, seed)
    tensors = {}
    for name, spec in class_of(architecture).specs(config).items():
        shape = tuple(size if size is not None else 1 for size in spec.shape)
        if not spec.floating:
            tensors[name] = _whole_numbers(name, d_sae)
        elif len(shape) == 2:
            tensors[name] = torch.randn(shape, generator=draw) / shape[0] ** (0.5 if name == "W_enc" else 0.25)
        elif name == "threshold":
            tensors[name] = 0.3 + 0.4 * torch.rand(shape, generator=draw)
        else:
            tensors[name] = 0.1 * torch.randn(shape, generator=draw)
    if architecture == "matching_pursuit":
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    kept = {name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return class_of(architecture)(config, kept, {"site": "resid_post.1", "model": {"name": "builtin/tiny-llama", "revision": None}})


def _whole_numbers(name: str, d_sae: int) -> Tensor:
    import torch

    return torch.tensor([d_sae // 4, d_sae // 4, d_sae - 2 * (d_sae // 4)])  # group_sizes


def fit_to(x_ND: Tensor, d_sae: int = 64, k: int = 8, seed: int = 0) -> SAE:
    """A TopK SAE whose latents point at rows of `x_ND`: not trained, but it reconstructs and fires unevenly, as a trained one does."""
    import torch

    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.sae import SAE

    x_ND = x_ND.float()
    mean_D = x_ND.mean(0)
    chosen = torch.randint(len(x_ND), (d_sae,), generator=generator("fit to", d_sae, seed))
    rows_FD = x_ND[chosen] - mean_D + 1e-3 * torch.randn(d_sae, x_ND.shape[1], generator=generator("fit to noise", d_sae, seed))
    W_dec_FD = torch.nn.functional.normalize(rows_FD, dim=1)
    tensors = {"W_enc": 0.4 * W_dec_FD.T.contiguous(), "b_enc": torch.zeros(d_sae), "W_dec": W_dec_FD, "b_dec": mean_D}
    return SAE.build(SAEConfig("topk", x_ND.shape[1], d_sae, params={"k": k}), tensors)


def rows_for(sae: SAE, n: int = 256, seed: int = 0) -> Tensor:
    """float32 [n, d_in] rows with a mean and a scale of their own, on which latents fire."""
    import torch

    draw = generator("rows for", sae.config.d_in, n, seed)
    offset_D = 0.3 * torch.randn(sae.config.d_in, generator=draw)
    return 1.5 * torch.randn(n, sae.config.d_in, generator=draw) + offset_D


def zoo() -> Iterator[tuple[str, SAE]]:
    """Every built-in row-wise architecture in every variant that its equation allows: (name, SAE). Temporal needs sequences, not rows."""
    from saehub.checkpoint.registry import BUILT_IN
    from saehub.checkpoint.registry import architecture as class_of
    from saehub.errors import FormatError

    for entry in BUILT_IN:
        if not class_of(entry.name).row_wise:
            continue
        for variant, fields in VARIANTS.items():
            try:
                sae = random_sae(entry.name, **fields)
            except FormatError:
                continue  # this architecture has no such variant
            yield (f"{entry.name}, {variant}" if variant else entry.name), sae
