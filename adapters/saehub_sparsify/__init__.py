"""EleutherAI's Sparsify as a saehub plugin: what it offers, as data; imports neither torch nor sparsify."""

from __future__ import annotations

from saehub import Component, hookimpl

ENV = (("SPARSIFY_DISABLE_TRITON", "1"), ("WANDB_MODE", "disabled"))
"""The library chooses its decoder at import, by whether triton is installed and not by device: without the first, decoding fails on a CPU."""


TRAINERS = (
    ("topk", "TopKConfig", "TopK by Sparsify's own Trainer (signum, adam, muon)"),
    ("groupmax", "GroupMaxConfig", "the largest latent of each of k groups, by Sparsify's own Trainer"),
    ("multi_topk", "MultiTopKConfig", "TopK whose loss also reconstructs from the 4k largest latents, by Sparsify's own Trainer"),
    ("transcoder", "TranscoderConfig", "a module's output from its input (topk or groupmax), by Sparsify's own Trainer"),
    ("skip_transcoder", "SkipTranscoderConfig", "a transcoder with a linear path beside it, by Sparsify's own Trainer"),
)


@hookimpl
def saehub_trainers() -> list[Component]:
    """Sparsify's `Trainer`, unmodified, on the hub's stream."""
    return [
        Component(
            name=name,
            target="saehub_sparsify.training:SparsifyTrainer",
            config=f"saehub_sparsify.config:{config}",
            requires=("sparsify",),
            extra="sparsify",
            needs=("activations",),
            env=ENV,
            summary=summary,
        )
        for name, config, summary in TRAINERS
    ] + [
        Component(
            name="end_to_end",
            target="saehub_sparsify.end_to_end:EndToEndTrainer",
            config="saehub_sparsify.config:EndToEndConfig",
            requires=("sparsify",),
            extra="sparsify",
            needs=("model", "tokens"),
            env=ENV,
            summary="SAEs and transcoders trained inside the model on its KL or cross-entropy, by Sparsify's own Trainer",
        )
    ]


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
