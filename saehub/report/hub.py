"""A run folder in; the head that the Hugging Face hub reads on a model card, and the entry that SAELens' directory of SAEs takes, out."""

from __future__ import annotations

import re
from typing import Any

from saehub.errors import SaehubError
from saehub.report import numbers
from saehub.report.run_folder import RunFolder
from saehub.report.sweep import first_dataset, values

FORMAT = "saelens"
"""The export whose folders SAELens' directory points at."""


def front_matter(run: RunFolder) -> list[str]:
    """YAML between `---` lines: library, tags, base model and datasets, as far as they are hub ids. Strings are JSON, which is YAML too."""
    import json

    card = run.card
    architectures = dict.fromkeys(str(sae.get("architecture")) for sae in (card.get("saes") or {}).values() if sae and sae.get("architecture"))
    tags = ["sparse-autoencoder", "mechanistic-interpretability", "saehub", *architectures]
    lines = ["---", f"library_name: {FORMAT if FORMAT in run.exports() else 'saehub'}", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    model = str((card.get("model") or {}).get("name") or "")
    if _hub_id(model):
        lines += [f"base_model: {json.dumps(model)}"]
    trained_on = ((card.get("data") or {}).get("train") or {}).get("sources") or []
    datasets = list(dict.fromkeys(str(item.get("source")) for item in trained_on if _hub_id(str(item.get("source") or ""))))
    if datasets:
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)]
    return [*lines, "---", ""]


def _hub_id(name: str) -> bool:
    """`org/name`, as far as its form tells."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not name.startswith("builtin/") and not re.search(r"\.(txt|jsonl|parquet)$", name)


def saelens_entry(run: RunFolder) -> str | None:
    """A release for SAELens' `pretrained_saes.yaml`, one SAE a SAELens export, with the L0 and explained variance measured in sample.

    `repo_id` is a placeholder: only who uploads it knows it. None where the run wrote no SAELens folder.
    """
    import yaml

    folders = run.exports().get(FORMAT) or {}
    if not folders:
        return None
    known = values(run.measurements, first_dataset(run.measurements))
    saes = []
    for name in folders:
        own = known.get(name) or {}
        entry: dict[str, Any] = {"id": name, "path": f"exports/{FORMAT}/{name}"}
        site = ((run.card.get("saes") or {}).get(name) or {}).get("provenance", {}).get("site")
        if own.get("l0") is not None:
            entry["l0"] = float(f"{own['l0']:.4g}")
        if own.get("explained_variance") is not None:
            entry["variance_explained"] = float(f"{own['explained_variance']:.4g}")
        entry["neuronpedia"] = None
        hook = _hook(run, site)
        if hook and len(folders) == len({_site_of(run, other) for other in folders}):
            entry["id"] = hook  # SAELens' own habit, where one SAE a hook makes it unique
        saes.append(entry)
    release = re.sub(r"[^a-z0-9]+", "-", str(run.card.get("recipe") or run.name).lower()).strip("-") or "release"
    model = str((run.card.get("model") or {}).get("name") or "")
    model = model if re.fullmatch(r"[\w./@:~ -]+", model) else "UNKNOWN"
    body = {release: {"conversion_func": None, "model": model, "repo_id": "YOUR-NAME/YOUR-REPO", "saes": saes}}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def _site_of(run: RunFolder, name: str) -> Any:
    return ((run.card.get("saes") or {}).get(name) or {}).get("provenance", {}).get("site")


def _hook(run: RunFolder, site: str | None) -> str | None:
    """`blocks.2.hook_resid_post` for `resid_post.2`; None where the model's family has no such name."""
    from saehub.api import ModelShape
    from saehub.sites import Site

    try:
        return Site.parse(site).names(ModelShape(**run.card["model"]["shape"])).get("transformer_lens") if site else None
    except (SaehubError, KeyError, TypeError):  # no model, or a card that does not say its sizes
        return None


def minimum(run: RunFolder) -> list[tuple[str, str]]:
    """What a reader must find on a card (name, where it is or why it is not there): nothing is left out silently."""
    from saehub.report.card import UNKNOWN, facts, wanted
    from saehub.report.verdicts import verdicts

    known: dict[tuple[str, str], Any] = {}
    for one in facts(run):  # of several texts the one trained on, of several SAEs the first
        known.setdefault((one.section.partition(" ")[0].rstrip(":"), one.name), one)

    def fact(*names: tuple[str, str]) -> str:
        found = [known[name] for name in names if name in known and known[name].known]
        return "; ".join(f"{one.name} {one.value}" for one in found) or f"{UNKNOWN}: the run's files do not say"

    lines = [
        ("model and revision", fact(("Model", "model"), ("Model", "revision"), ("Model", "fingerprint"))),
        ("tensor", fact(("SAE", "site"))),
        ("architecture and sizes", fact(("SAE", "architecture"), ("SAE", "shape"))),
        ("dtype and normalisation", fact(("Activations", "dtype"), ("Activations", "normalisation"))),
        ("BOS and masking", fact(("Text", "BOS"), ("Text", "excluded tokens"))),
        ("data", fact(("Text", "sources"), ("Text", "hash"), ("Activations", "stream hash"))),
        ("tokens trained", fact(("SAE", "tokens trained"))),
        ("hardware and cost", fact(("Machine", "device"), ("Machine", "processor"), ("Run", "wall time"), ("SAE", "speed"), ("Machine", "peak memory"), ("Run", "lock file"))),
        ("golden activations", fact(("SAE", "golden probe"))),
    ]
    lines += [(words, "measured, see the results" if reason is None else f"{UNKNOWN}: {reason}") for words, reason in wanted(run)]
    said = verdicts(run.measurements)
    lines.append(("verdict", "; ".join(f"{one.sae}: {one.word} ({'; '.join(one.reasons) or 'no reason given'})" for one in said) or f"{UNKNOWN}: native/verdict was not run"))
    trained = (run.card.get("saes") or {}).values()
    if len(trained) > 1:
        lines.append(("several SAEs", f"the facts above are of the first of {numbers.count(len(trained))}; each has a section of its own below"))
    return lines
