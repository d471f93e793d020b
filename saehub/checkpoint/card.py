"""What `inspect` says of a checkpoint in; a model card in Markdown for the Hugging Face hub out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIBRARIES = {"formats": "saehub"}
"""Plugin -> the hub's `library_name`, where it is not the plugin's own name."""


def card(about: Mapping[str, Any], path: Path, address: str, figures: Mapping[str, Any] | None = None) -> str:
    """The card of the checkpoint at `path`, which will be found at `address` (`hf://…`). Numbers come from the checkpoint's own files and
    from `figures`; nothing is added that neither says."""
    lines = [*_front_matter(about), f"# {_plain(address.removeprefix('hf://'))}", ""]
    lines += [f"A sparse {_plain(about['kind']).replace('_', ' ')} ({_plain(about['architecture'])}): {_plain(about['equation']) or 'see its plugin'}.", ""]
    lines += _table(("", ""), _facts(about))
    lines += ["## Load", "", "```python", "import saehub", "", f"sae = saehub.load({json.dumps(address)})", "acts = sae.encode(x)", "```", ""]
    lines += ["Check it, or have it in another library's format:", "", "```"]
    lines += [f"saehub verify {address}", f"saehub convert {address} DST --to FORMAT", "```", ""]
    lines += _certificate(path)
    if figures:
        lines += ["## Measurements", "", *_table(("metric", "value"), [(name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in figures.items()])]
    if about.get("missing"):
        lines += ["## Not recorded", "", *(f"- {_plain(item)}" for item in about["missing"]), ""]
    return "\n".join(lines)


def front_page(about: Mapping[str, Any], repo: str, address: str) -> str:
    """The card of a repository that had none, when a folder is put into it."""
    lines = [*_front_matter(about), f"# {_plain(repo)}", "", "Sparse autoencoders, one in each folder; each folder has its own README.md."]
    return "\n".join([*lines, "", "```python", "import saehub", "", f"sae = saehub.load({json.dumps(address)})", "```", ""])


def _front_matter(about: Mapping[str, Any]) -> list[str]:
    plugin = str(about["format"]).partition("/")[0]
    model = str((about["provenance"].get("model") or {}).get("name") or "")
    tags = ["sparse-autoencoder", "mechanistic-interpretability", "saehub", str(about["architecture"])]
    lines = ["---", f"library_name: {json.dumps(LIBRARIES.get(plugin, plugin))}", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if model.count("/") == 1 and not model.startswith(("builtin/", "/", ".", "~")):  # a hub id, as far as its form tells
        lines.append(f"base_model: {json.dumps(model)}")
    return [*lines, "---", ""]


def _facts(about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    provenance = about["provenance"]
    model, tokens, data, trainer = (provenance.get(key) or {} for key in ("model", "tokens", "data", "trainer"))
    site = provenance.get("site") or provenance.get("unknown_site")
    target = provenance.get("target_site") or provenance.get("unknown_target_site")
    sizes = f"d_in {about['d_in']}, d_sae {about['d_sae']}, d_out {about['d_out']}"
    found = [
        ("model", " @ ".join(str(model[key]) for key in ("name", "revision") if model.get(key))),
        ("site", site),
        ("target site", target),
        ("sizes", sizes),
        ("parameters", ", ".join(f"{name} = {value}" for name, value in about["params"].items())),
        ("context", f"{tokens['context']} tokens, BOS: {tokens.get('bos', '?')}" if tokens.get("context") else None),
        ("trained on", f"{data['tokens_trained']:,} tokens" if isinstance(data.get("tokens_trained"), int) else None),
        ("trained with", " ".join(str(trainer[key]) for key in ("component", "version") if trainer.get(key))),
        ("format", about["format"]),
        ("golden probe", f"{about['probe']['rows']} rows" if about.get("probe") else None),
        ("SHA-256 of the tensors", about["tensors_hash"]),
    ]
    return [(name, value) for name, value in found if value]


def _certificate(path: Path) -> list[str]:
    from saehub.checkpoint.certificate import FILE, Certificate

    if not (path / FILE).is_file():
        return []
    found = Certificate.read(path / FILE)
    source = f"{found.source.get('format')}, tensors {str(found.source.get('tensors_hash'))[:16]}…"
    lines = ["## Conversion certificate", "", f"Converted from {_plain(source)}: **{_plain(found.outcome)}**." + (f" {_plain(found.reason)}" if found.reason else "")]
    lines += [f"\nCaution: the source's own {_plain(caution)}." for caution in found.cautions]
    rows: list[tuple[str, Any]] = []
    if found.rows:
        s, r = found.support, found.reconstruction
        rows += [
            ("rows", f"{found.rows} ({found.inputs})"),
            ("mean L0", f"{found.mean_l0:.1f}"),
            ("latents exercised", f"{found.latents_exercised:.1%}"),
            ("active latents that differ", f"{s['different']}, of which unexplained by rounding: {s['unexplained']}"),
            ("reconstruction, relative difference", f"{r['frobenius']:.1e} in all, {r['worst_row']:.1e} in the worst row"),
        ]
    rows += [(name, ", ".join(items)) for name, items in (("folded", found.folded), ("dropped", found.dropped)) if items]
    return [*lines, "", *(_table(("", ""), rows) if rows else []), f"All numbers: `{FILE}`. It proves that source and target are the same function, not that the source's metadata is right.", ""]


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows), ""]


def _plain(value: Any) -> str:
    """Words from a checkpoint as one line of Markdown that is nothing but words: no cells, tags, links or code of their own."""
    text = " ".join(str(value).split())
    for sign in "\\|<>[]`*":
        text = text.replace(sign, {"<": "&lt;", ">": "&gt;"}.get(sign, "\\" + sign))
    return text
