"""A SAELens config of any version in, one in the words of version 6 out; what the library's own loader does, and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
METADATA = (
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens",
    "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version", "sae_lens_training_version", "hook_name_out",
    "hook_head_index_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip
"""Keys that stood at the top level before version 6."""


def is_version_6(config: dict[str, Any]) -> bool:
    """Whether SAELens 6 takes the config as it is; one without a version counts as older."""
    metadata = config.get("metadata")
    version = config.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    head = str(version or "0").split(".")[0]
    return head.isdigit() and int(head) >= 6


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """The config in version 6's words (a copy). Before 6: flat, `activation_fn_str` and `activation_fn_kwargs`, booleans for norms."""
    if is_version_6(config):
        return dict(config)
    flat = {_RENAMED.get(key, key): value for key, value in config.items()}
    activation, arguments = flat.get("activation_fn", "relu"), flat.get("activation_fn_kwargs") or {}
    architecture = flat.get("architecture", "standard")
    if activation == "topk":
        if not isinstance(arguments, dict) or arguments.get("k") is None:
            raise FormatError("cfg.json: activation topk without activation_fn_kwargs.k")
        architecture = "topk"
        flat["k"] = arguments["k"]
    elif activation != "relu" and architecture == "standard":
        raise FormatError(
            f"cfg.json: activation {activation!r} cannot be read",
            why="SAELens before version 6 allowed it; today's ignores the word and uses ReLU",
        )
    norm = flat.get("normalize_activations")
    flat["normalize_activations"] = {None: "none", False: "none", True: "expected_average_only_in"}.get(norm, norm)
    flat.setdefault("apply_b_dec_to_input", True)
    flat.setdefault("reshape_activations", "hook_z" if "hook_z" in str(flat.get("hook_name", "")) else "none")
    flat["metadata"] = {key: flat[key] for key in METADATA if key in flat}
    flat["architecture"] = architecture
    return flat


def drop_unit_scaling(tensors: dict[str, Tensor]) -> str | None:
    """Remove a `scaling_factor` of ones, which old checkpoints carry and the library ignores, and give its dtype; refuse any other."""
    factor = tensors.get("scaling_factor")
    if factor is None:
        return None
    if not bool((factor == 1).all()):
        raise FormatError(
            "the checkpoint has a finetuning scaling_factor", why="SAELens 6 no longer applies it, so what it computes is not defined"
        )
    del tensors["scaling_factor"]
    return str(factor.dtype).removeprefix("torch.")


def unit_scaling(sae: SAE, dtype: str) -> Tensor:
    """The `scaling_factor` of ones again."""
    import torch

    return torch.ones(sae.config.d_sae, dtype=getattr(torch, dtype))
