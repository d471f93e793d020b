"""The name of an architecture in; its class and who provides it out. Built-in entries and plugins' entries are the same data."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from saehub.api import ArchitectureEntry
from saehub.errors import FormatError, did_you_mean

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE

_HERE = "saehub.checkpoint.architectures"
BUILT_IN: tuple[ArchitectureEntry, ...] = (
    ArchitectureEntry("relu", f"{_HERE}.relu:ReLU", "f = max(p, 0)"),
    ArchitectureEntry("topk", f"{_HERE}.topk:TopK", "f = max(p, 0) on the k largest p of a row"),
    ArchitectureEntry("abstopk", f"{_HERE}.abstopk:AbsTopK", "f = p on the k largest |p| of a row, sign kept"),
    ArchitectureEntry("batchtopk", f"{_HERE}.batchtopk:BatchTopK", "f = max(p, 0) [p > θ], one θ that keeps k a row on average"),
    ArchitectureEntry("matryoshka", f"{_HERE}.matryoshka:Matryoshka", "batchtopk whose prefixes of latents reconstruct by themselves"),
    ArchitectureEntry("jumprelu", f"{_HERE}.jumprelu:JumpReLU", "f = max(p, 0) [p > θ_i]"),
    ArchitectureEntry("gated", f"{_HERE}.gated:Gated", "f = [x'W + b_gate > 0] max(x'(W e^{r_mag}) + b_mag, 0)"),
    ArchitectureEntry("groupmax", f"{_HERE}.groupmax:GroupMax", "f = max(p, 0) on the largest p of each of k groups"),
    ArchitectureEntry("temporal", f"{_HERE}.temporal:Temporal", "f = max(λ r W, 0) of what attention to earlier positions does not predict"),
    ArchitectureEntry(
        "matching_pursuit", f"{_HERE}.matching_pursuit:MatchingPursuit", "greedy: f_i += r·d_i, r -= f_i d_i for the largest r·d_i"
    ),
)


def _built_in() -> dict[str, ArchitectureEntry]:
    return {entry.name: entry for entry in BUILT_IN}


def names() -> list[str]:
    """Every architecture that can be loaded here, built-in ones first."""
    from saehub.plugins import catalog

    return [*_built_in(), *(name for name in catalog().architectures() if name not in _built_in())]


def architecture(name: str, provider: str | None = None) -> type[SAE]:
    """The class; an unknown name is a FormatError that says which package to install (`provider`, from saehub.json)."""
    entry = _built_in().get(name)
    if entry is not None:
        module, _, attribute = entry.target.partition(":")
        return getattr(import_module(module), attribute)
    from saehub.plugins import catalog

    registered = catalog().architectures().get(name)
    if registered is None:
        if provider and provider != "saehub":
            fix = f"pip install {provider}   (the checkpoint says that {provider} provides it; see: saehub plugins ls)"
        else:
            fix = f"install the plugin that provides it; known here: {', '.join(names())}"
        raise FormatError(f"no installed package provides the architecture {name!r}{did_you_mean(name, names())}", fix=fix)
    if provider not in (None, "unknown", "saehub", registered.distribution):
        raise FormatError(
            f"the architecture {name!r} of this checkpoint is that of {provider}; the one installed here is that of {registered.distribution}",
            why="two packages use one name for what may be two equations",
            fix=f"pip install {provider}, and leave {registered.distribution} out: SAEHUB_DISABLE_PLUGINS={registered.plugin}",
        )
    from saehub.checkpoint.sae import SAE

    found = registered.load()
    if not (isinstance(found, type) and issubclass(found, SAE)):
        raise FormatError(
            f"the architecture {name!r} of {registered.distribution} is not a subclass of saehub.SAE", where=registered.entry.target
        )
    return found


def provider(name: str) -> str:
    """The distribution to install for an architecture: `saehub` for built-in ones."""
    if name in _built_in():
        return "saehub"
    from saehub.plugins import catalog

    registered = catalog().architectures().get(name)
    return registered.distribution if registered else "unknown"
