"""TransformerLens as a saehub plugin: what it offers, as data; imports neither torch nor transformer_lens."""

from __future__ import annotations

from saehub import Component, hookimpl


@hookimpl
def saehub_extractors() -> list[Component]:
    """Activations through a TransformerBridge."""
    return [
        Component(
            name="bridge",
            target="saehub_transformer_lens.extract:BridgeExtractor",
            config="saehub_transformer_lens.config:BridgeConfig",
            requires=("transformer_lens",),
            extra="transformer-lens",
            env=(("TQDM_DISABLE", "1"),),
            needs=("model", "tokens"),
            summary="activations by TransformerLens' hook names, through a TransformerBridge over the unprocessed weights",
        )
    ]
