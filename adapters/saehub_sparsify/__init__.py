"""EleutherAI's Sparsify as a saehub plugin: what it offers, as data; imports neither torch nor sparsify."""

from __future__ import annotations

from saehub import Component, hookimpl

ENV = (("SPARSIFY_DISABLE_TRITON", "1"), ("WANDB_MODE", "disabled"))
"""The library chooses its decoder at import, by whether triton is installed and not by device: without the first, decoding fails on a CPU."""


@hookimpl
def saehub_exporters() -> list[Component]:
    """Read, write and run Sparsify checkpoint folders (`cfg.json`, `sae.safetensors`)."""
    return [
        Component(
            name="sparsify",
            target="saehub_sparsify.codec:SparsifyFormat",
            requires=("sparsify",),
            extra="sparsify",
            env=ENV,
            summary="Sparsify (eai-sparsify) checkpoints: topk, groupmax, multi-topk, transcoders and skip transcoders",
        )
    ]
