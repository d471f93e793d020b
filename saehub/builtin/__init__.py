"""Names of the embedded model and text sources come in; the model's folder goes out. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from saehub.errors import UsageError, did_you_mean

MODELS: dict[str, str] = {"tiny-llama": "tiny_llama"}
"""Embedded models: name after `builtin/` -> folder beside this file."""

SOURCES: tuple[str, ...] = ("python-docs", "python-code")
"""Embedded text sources: names after `builtin/`, read by `saehub.builtin.text.documents`."""


def model_dir(name: str) -> Path:
    """The folder of an embedded model, loadable with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    `name` is `builtin/tiny-llama` (or `tiny-llama`). Raises ValueError with the choices when there is no such model.
    """
    key = name.removeprefix("builtin/")
    if key not in MODELS:
        raise unknown_name("model", name, MODELS)
    return Path(__file__).resolve().parent / MODELS[key]


class UnknownBuiltin(UsageError, ValueError):
    """A name that is not embedded."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UnknownBuiltin:
    """The error for a name that is not embedded: what was asked for, the nearest choice, all choices."""
    prefix = "builtin/" if name.startswith("builtin/") else ""
    known = [prefix + choice for choice in sorted(choices)]
    return UnknownBuiltin(f"no embedded {kind} is called {name!r}{did_you_mean(name, known)}", fix=f"use one of: {', '.join(known)}")
