"""saehub: train, evaluate, convert and verify sparse autoencoders with any library; names are loaded on first use, so importing this is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "SAE": ("saehub.checkpoint.sae", "SAE"),
    "SAEConfig": ("saehub.checkpoint.config", "SAEConfig"),
    "TensorSpec": ("saehub.checkpoint.sae", "TensorSpec"),
    "Site": ("saehub.sites", "Site"),
    "load": ("saehub.checkpoint.load", "load"),
    "save": ("saehub.checkpoint.format", "save"),
    "convert": ("saehub.checkpoint.convert", "convert"),
    "run": ("saehub.pipeline.run", "run_recipe"),
    "hookimpl": ("saehub.hookspecs", "hookimpl"),
    "Component": ("saehub.api", "Component"),
    "ArchitectureEntry": ("saehub.api", "ArchitectureEntry"),
    "Measurement": ("saehub.api", "Measurement"),
    "SaehubError": ("saehub.errors", "SaehubError"),
    "UsageError": ("saehub.errors", "UsageError"),
    "FormatError": ("saehub.errors", "FormatError"),
    "NeedsInput": ("saehub.errors", "NeedsInput"),
}
__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from saehub.api import ArchitectureEntry, Component, Measurement
    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.convert import convert
    from saehub.checkpoint.format import save
    from saehub.checkpoint.load import load
    from saehub.checkpoint.sae import SAE, TensorSpec
    from saehub.errors import FormatError, NeedsInput, SaehubError, UsageError
    from saehub.hookspecs import hookimpl
    from saehub.pipeline.run import run_recipe as run
    from saehub.sites import Site


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saehub' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
