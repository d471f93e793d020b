"""A component in; a report out that says which promises of its kind it keeps. Toy data and models for tests; imports no torch until used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_LAZY = {
    "check_trainer": "saehub.testing.trainers",
    "check_extractor": "saehub.testing.extractors",
    "check_evaluator": "saehub.testing.evaluators",
    "check_exporter": "saehub.testing.exporters",
    "ConformanceReport": "saehub.testing.conformance",
    "Check": "saehub.testing.conformance",
    "planted": "saehub.testing.toys",
    "mmcs": "saehub.testing.toys",
    "tiny_model": "saehub.testing.toys",
    "tiny_text": "saehub.testing.toys",
}
__all__ = list(_LAZY)

if TYPE_CHECKING:
    from saehub.testing.conformance import Check, ConformanceReport
    from saehub.testing.evaluators import check_evaluator
    from saehub.testing.exporters import check_exporter
    from saehub.testing.extractors import check_extractor
    from saehub.testing.toys import mmcs, planted, tiny_model, tiny_text
    from saehub.testing.trainers import check_trainer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saehub.testing' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
