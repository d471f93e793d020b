"""A checkpoint of any known format in; what it is, where it came from and what it does not say out, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saehub.checkpoint.load import NATIVE, codec, find_format, locate, unknown

WANTED = {
    "site": "which tensor of the model it reads",
    "model": "which language model it was trained on",
    "tokens": "how text was tokenised and packed",
    "data": "what it was trained on",
    "trainer": "what trained it",
}
"""Provenance that a checkpoint should carry, and what is lost without it."""


def inspect(source: str | Path) -> dict[str, Any]:
    """Architecture, equation, sizes, tensors, site, provenance, and under `missing` what the checkpoint does not say.

    FormatError: damaged, or in no known format. Any known format; the tensors of the hub's own are not read, only compared with their
    header: `damaged` says what is not as it was saved. (`verify` reads them.)
    """
    from saehub.checkpoint import format as v1

    path, origin = locate(source)
    name, damaged = find_format(path), []
    if name is None:
        raise unknown(path)
    if name == NATIVE:
        header = v1.read_header(path)
        config, provenance = v1.read_config(path, header), dict(header.get("provenance") or {})
        entries = {tensor: {"dtype": e["dtype"], "shape": e["shape"]} for tensor, e in header["tensors"].items()}
        identity, probe, damaged = header["tensors_hash"], header["probe"], v1.damage(path, header)
    else:
        sae = codec(name)[1].read(path)
        config, provenance, probe = sae.config, sae.provenance, None
        entries = {tensor: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for tensor, t in sae.tensors().items()}
        identity = v1.sae_hash(sae)
    found: dict[str, Any] = {"path": str(source), "format": name, **config.to_json(), "equation": _equation(config.architecture)}
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]  # some formats keep several SAEs in a folder
    found |= {"tensors": entries, "tensors_hash": identity, "bytes": sum(file.stat().st_size for file in files)}
    found["probe"] = {"rows": probe["rows"], "tokens": probe.get("tokens", False)} if probe else None
    found |= {"provenance": provenance, "missing": _missing(provenance, probe, config.kind), "damaged": damaged}
    return found | ({"hub": origin} if origin else {})


def _equation(architecture: str) -> str:
    from saehub.checkpoint.registry import BUILT_IN
    from saehub.plugins import catalog

    entries = {name: registered.entry for name, registered in catalog().architectures().items()} | {entry.name: entry for entry in BUILT_IN}
    return entries[architecture].summary if architecture in entries else ""


def _missing(provenance: dict[str, Any], probe: dict[str, Any] | None, kind: str) -> list[str]:
    lost = [f"{key}: {why}" for key, why in WANTED.items() if not provenance.get(key)]
    if kind != "autoencoder" and not provenance.get("target_site"):
        lost.append("target_site: which tensor of the model it predicts")
    if probe is None:
        lost.append("probe: without one, `verify` has hashes alone, or nothing, to go by")
    elif not probe.get("tokens"):
        lost.append("probe tokens: without them the site cannot be verified")
    return lost
