"""The seven hooks of a saehub plugin: each takes nothing and returns registrations; the docstring of each is a complete plugin module."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pluggy

from saehub.api import ArchitectureEntry, Component

hookspec = pluggy.HookspecMarker("saehub")
hookimpl = pluggy.HookimplMarker("saehub")


@hookspec
def saehub_extractors() -> Iterable[Component]:
    """Components that turn a model and tokens into activation rows (`saehub.api.Extractor`).

    .. versionadded:: 0.1

    Example:
        from saehub import Component, hookimpl

        @hookimpl
        def saehub_extractors():
            return [Component(name="hf", target="my_plugin.extract:Extractor", config="my_plugin.config:ExtractConfig",
                              needs=("model", "tokens"), summary="reads activations with forward hooks")]
    """


@hookspec
def saehub_trainers() -> Iterable[Component]:
    """Components that train SAEs on the hub's stream (`saehub.api.Trainer`).

    .. versionadded:: 0.1

    Example:
        from saehub import Component, hookimpl

        @hookimpl
        def saehub_trainers():
            return [Component(name="topk", target="my_plugin.train:TopKTrainer", config="my_plugin.config:TopKConfig",
                              needs=("activations",), summary="k largest pre-activations a row")]
    """


@hookspec
def saehub_evaluators() -> Iterable[Component]:
    """Components that measure SAEs (`saehub.api.Evaluator`).

    .. versionadded:: 0.1

    Example:
        from saehub import Component, hookimpl

        @hookimpl
        def saehub_evaluators():
            return [Component(name="l0", target="my_plugin.evaluate:L0", needs=("model", "tokens"), summary="mean latents a row")]
    """


@hookspec
def saehub_exporters() -> Iterable[Component]:
    """Components that read, write and run another library's checkpoints (`saehub.api.Exporter`).

    .. versionadded:: 0.1

    Example:
        from saehub import Component, hookimpl

        @hookimpl
        def saehub_exporters():
            return [Component(name="house", target="my_plugin.codec:HouseFormat", requires=("house_library",),
                              summary="the house format")]
    """


@hookspec
def saehub_results() -> Iterable[Component]:
    """Components that write measurements as another library's result files, and read such files (`saehub.api.ResultFormat`).

    .. versionadded:: 0.1

    Example:
        from saehub import Component, hookimpl

        @hookimpl
        def saehub_results():
            return [Component(name="house-json", target="my_plugin.results:HouseJson", summary="the house's result files")]
    """


@hookspec
def saehub_architectures() -> Iterable[ArchitectureEntry]:
    """Architectures: subclasses of `saehub.SAE` that checkpoints name.

    .. versionadded:: 0.1

    Example:
        from saehub import ArchitectureEntry, hookimpl

        @hookimpl
        def saehub_architectures():
            return [ArchitectureEntry(name="softcap", target="my_plugin.softcap:SoftCap", summary="f = c tanh(relu(p) / c)")]
    """


@hookspec
def saehub_recipes() -> Iterable[Path]:
    """Recipe files (or folders of `*.yaml`) that the plugin ships.

    .. versionadded:: 0.1

    Example:
        from pathlib import Path
        from saehub import hookimpl

        @hookimpl
        def saehub_recipes():
            return [Path(__file__).parent / "recipes"]
    """


COMPONENT_HOOKS = {
    "extractor": "saehub_extractors",
    "trainer": "saehub_trainers",
    "evaluator": "saehub_evaluators",
    "exporter": "saehub_exporters",
    "results": "saehub_results",
}
HOOKS = (*COMPONENT_HOOKS.values(), "saehub_architectures", "saehub_recipes")
