"""Sparse autoencoders and their files: names are loaded on first use, so importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_LAZY = {
    "SAE": "sae",
    "SAEConfig": "config",
    "TensorSpec": "sae",
    "architecture": "registry",
    "save": "format",
    "read_header": "format",
    "load": "load",
    "find_format": "load",
    "inspect": "inspect",
    "make_probe": "probe",
    "Probe": "probe",
    "verify": "verify",
    "convert": "convert",
    "Certificate": "certificate",
    "push": "push",
}
__all__ = [
    "SAE",
    "SAEConfig",
    "TensorSpec",
    "architecture",
    "save",
    "read_header",
    "load",
    "find_format",
    "inspect",
    "make_probe",
    "Probe",
    "verify",
    "convert",
    "Certificate",
    "push",
]

if TYPE_CHECKING:
    from saehub.checkpoint.certificate import Certificate
    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.convert import convert
    from saehub.checkpoint.format import read_header, save
    from saehub.checkpoint.inspect import inspect
    from saehub.checkpoint.load import find_format, load
    from saehub.checkpoint.probe import Probe, make_probe
    from saehub.checkpoint.push import push
    from saehub.checkpoint.registry import architecture
    from saehub.checkpoint.sae import SAE, TensorSpec
    from saehub.checkpoint.verify import verify


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saehub.checkpoint' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"saehub.checkpoint.{_LAZY[name]}"), name)
