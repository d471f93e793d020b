"""Names of the embedded model and text sources come in; the model's folder goes out. Imports no torch."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

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


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not embedded: what was asked for, the nearest choice, all choices."""
    known = sorted(choices)
    prefix = "builtin/" if name.startswith("builtin/") else ""
    near = difflib.get_close_matches(name.removeprefix("builtin/"), known, n=1, cutoff=0.5)
    hint = f" Did you mean {prefix + near[0]!r}?" if near else ""
    return ValueError(f"no embedded {kind} is called {name!r}.{hint} Available: {', '.join(prefix + k for k in known)}.")
