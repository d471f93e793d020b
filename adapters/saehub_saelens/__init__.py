"""SAELens as a saehub plugin: what it offers, as data; imports neither torch nor sae_lens."""

from __future__ import annotations

from saehub import Component, hookimpl

OFFLINE = (("WANDB_MODE", "disabled"),)


@hookimpl
def saehub_exporters() -> list[Component]:
    """Read, write and run SAELens checkpoint folders (`cfg.json`, `sae_weights.safetensors`)."""
    return [
        Component(
            name="saelens",
            target="saehub_saelens.codec:SAELensFormat",
            requires=("sae_lens",),
            extra="saelens",
            env=OFFLINE,
            summary="SAELens checkpoints: every inference architecture, and training folders of any (read as the SAE that they become)",
        )
    ]
