"""Nothing in; what this plugin offers out. Registrations are data: nothing heavy is imported before a stage runs."""

from __future__ import annotations

from pathlib import Path

from saehub import ArchitectureEntry, Component, hookimpl

ARCHITECTURE = "peak"
"""What checkpoints call it: one name, one meaning, among all plugins that anybody installs."""


@hookimpl
def saehub_architectures() -> list[ArchitectureEntry]:
    """`peak`: what checkpoints name, and how they are loaded."""
    return [ArchitectureEntry(name=ARCHITECTURE, target="saehub_example.architecture:Peak", summary="f = max(p, 0) [p ≥ τ max_j p_j]")]


@hookimpl
def saehub_trainers() -> list[Component]:
    """`example/peak`."""
    return [
        Component(
            name="peak",
            target="saehub_example.train:PeakTrainer",
            config="saehub_example.train_config:PeakConfig",
            needs=("activations",),
            summary="Peak: latents within a share of the row's largest",
        )
    ]


@hookimpl
def saehub_extractors() -> list[Component]:
    """`example/bars`."""
    return [
        Component(
            name="bars",
            target="saehub_example.extract:BarsExtractor",
            config="saehub_example.extract_config:BarsConfig",
            summary="a small convolutional network looking at images of bars: neither text nor a transformer",
        )
    ]


@hookimpl
def saehub_evaluators() -> list[Component]:
    """`example/dominance`."""
    return [
        Component(
            name="dominance",
            target="saehub_example.evaluate:Dominance",
            config="saehub_example.evaluate_config:DominanceConfig",
            needs=("model", "tokens"),
            summary="share of a row's activation that its strongest latents carry",
        )
    ]


@hookimpl
def saehub_exporters() -> list[Component]:
    """`example/folio`."""
    return [Component(name="folio", target="saehub_example.codec:Folio", summary="a folder of .npy arrays and one folio.json")]


@hookimpl
def saehub_recipes() -> list[Path]:
    """`saehub recipe run example/peak`."""
    return [Path(__file__).parent / "recipes"]
