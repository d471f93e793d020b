"""A run folder in; its facts in order (model, text, stream, SAEs, machine), and what nobody measured, out: for page, card and terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saehub.jsonio import read_json
from saehub.report import numbers
from saehub.report.run_folder import RunFolder
from saehub.report.table import Group, Row, dataset_label, footnote, groups, sizes
from saehub.report.text import clean

UNKNOWN = "not measured"
WANTED = (
    (("fvu", "explained_variance"), "reconstruction: FVU or explained variance", "native/core"),
    (("l0",), "sparsity: L0", "native/core"),
    (("ce_recovered_zero", "ce_recovered"), "cross-entropy recovered against zero-ablation", "native/core"),
    (("ce_recovered_mean",), "cross-entropy recovered against mean-ablation", "native/core"),
    (("kl_recovered_zero", "kl_spliced", "kl"), "KL divergence under the reconstruction", "native/core"),
    (("dead",), "dead latents, with token budget", "native/core"),
    (("redundancy",), "redundancy (mean over latents of the greatest decoder cosine)", "native/health"),
    (("absorption", "mean_absorption"), "feature absorption", "saebench/absorption, on models of a billion parameters or more"),
    (("shared_share", "pw_mcc", "stability"), "stability over training seeds", "native/stability, with a second seed (recipe seed-pair)"),
    (("paraphrase",), "stability under paraphrase", "native/paraphrase"),
    (("drift",), "stability under drift of model or text", "native/drift"),
)
"""What a reader of a run card looks for: (beginnings of metric names, words, what would measure it)."""


@dataclass(frozen=True)
class Fact:
    """One line of a run card."""

    section: str
    name: str
    value: str
    known: bool = True


def facts(run: RunFolder) -> list[Fact]:
    """Every fact of the card, in order; what should be known and is not, says so."""
    found: list[Fact] = []
    for section, pairs in _sections(run):
        for name, value in pairs:
            known = value not in (None, "", "-", [], {})
            found.append(Fact(section, name, _words(value) if known else UNKNOWN, known))
    return found


def by_section(facts: Iterable[Fact]) -> list[tuple[str, list[Fact]]]:
    """The facts by section, in order."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(fact.section, []).append(fact)
    return list(found.items())


def _sections(run: RunFolder) -> Iterator[tuple[str, Iterable[tuple[str, Any]]]]:
    card = run.card
    if not card:  # it did not get so far as to write one
        yield "Run", [*_run(run), ("started", numbers.moment(run.when)), ("recipe", run.lock.get("recipe", {}).get("name"))]
        return
    yield "Model", _model(card.get("model"))
    for name, entry in (card.get("data") or {}).items():
        yield f"Text: {dataset_label(name)}", _dataset(entry or {})
    yield "Activations", _activations(card)
    for name, entry in (card.get("saes") or {}).items():
        yield f"SAE {name}", _sae(entry or {}, run.path / "checkpoints" / name)
    if card.get("exports"):
        yield "Exports", [(name, certificate(run, name)) for name in card["exports"]]
    yield "Machine", _machine(card)
    yield "Run", _run(run)


def _model(model: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    if model is None:
        yield "model", "none: activations from files, or SAEs alone"
        return
    shape = model.get("shape") or {}
    yield "model", model.get("name")
    yield "revision", model.get("revision") or "main"
    yield "fingerprint", model.get("fingerprint")
    yield "size", f"{shape.get('n_layers')} layers, width {shape.get('d_model')}, {shape.get('family')}" if shape else None
    yield "dtype", model.get("dtype")
    yield "attention", model.get("attention")
    yield "weight processing", model.get("weight_processing")


def _dataset(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    policy = data.get("policy") or {}
    yield "sources", "; ".join(_source(item) for item in data.get("sources") or [])
    yield "rows", numbers.count(data.get("rows"))
    yield (
        "sequences",
        f"{numbers.count(data['n_sequences'])} of {policy.get('context') or data.get('context')} tokens"
        if data.get("n_sequences")
        else None,
    )
    yield "BOS", policy.get("bos") or data.get("bos")
    yield "excluded tokens", ", ".join(map(str, policy.get("exclude", data.get("exclude")) or [])) or "none"
    if policy.get("template") or data.get("template"):
        yield "template", policy.get("template") or data.get("template")
    if data.get("calibration_rows"):
        yield "calibration rows", numbers.count(data["calibration_rows"])
    if data.get("python"):
        yield "read from the library of", f"Python {data['python']}"
    yield "tokenizer", (data.get("tokenizer") or {}).get("hash")
    yield "hash", data.get("hash")


def _source(item: Mapping[str, Any]) -> str:
    weight = item.get("weight")
    extra = "".join(f", {name} {item[name]}" for name in ("config", "revision") if item.get(name))
    return f"{item.get('source')} ({item.get('split')}{f', weight {weight:g}' if isinstance(weight, (int, float)) else ''}{extra})"


def _activations(card: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    extract = card.get("extract") or {}
    yield "extractor", extract.get("uses")
    yield "sites", ", ".join(extract.get("sites") or [])
    yield "dtype", extract.get("dtype")
    yield "normalisation", extract.get("normalize")
    yield "sequences a forward pass", extract.get("lm_batch")
    hashes = {(entry.get("provenance") or {}).get("data", {}).get("stream_hash") for entry in (card.get("saes") or {}).values() if entry}
    yield "stream hash", ", ".join(sorted(text for text in hashes if text))
    yield "stored", {"none": "no", "spool": "while the run lasted", "disk": "yes"}.get(str(card.get("store")), card.get("store"))


def _sae(entry: Mapping[str, Any], checkpoint: Path) -> Iterator[tuple[str, Any]]:
    provenance = entry.get("provenance") or {}
    header = read_json(checkpoint / "saehub.json") if (checkpoint / "saehub.json").is_file() else {}
    params = entry.get("params") or header.get("params") or {}
    yield (
        "architecture",
        " ".join(
            [
                str(entry.get("architecture") or ""),
                *(f"{name} {value}" for name, value in params.items() if isinstance(value, (int, float, str))),
            ]
        ).strip(),
    )
    yield "site", " → ".join(text for text in (provenance.get("site"), provenance.get("target_site")) if text)
    if entry.get("d_in"):
        yield "shape", f"{numbers.count(entry['d_in'])} → {numbers.count(entry.get('d_sae'))} latents → {numbers.count(entry.get('d_out'))}"
    yield "trainer", entry.get("trainer") or (provenance.get("trainer") or {}).get("component")
    yield "settings", ", ".join(f"{name} {value}" for name, value in (entry.get("config") or {}).items() if value is not None)
    data = provenance.get("data") or {}
    yield "tokens trained", numbers.count(entry.get("rows") or data.get("tokens_trained"))
    if entry.get("steps"):
        yield "steps", f"{numbers.count(entry['steps'])} of {numbers.count(entry.get('batch'))} rows"
    yield "seed", (provenance.get("trainer") or {}).get("seed")
    yield "training time", numbers.duration(entry.get("seconds"))
    yield "speed", f"{numbers.short(entry['rows_per_second'])} tokens/s" if entry.get("rows_per_second") else None
    yield "tensors hash", entry.get("tensors_hash")
    probe = header.get("probe") or {}
    yield "golden probe", f"{numbers.count(probe.get('rows'))} rows, {probe.get('sha256')}" if probe else None


def _machine(card: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    here = card.get("environment") or {}
    yield "device", " ".join(str(here[name]) for name in ("device", "device_name") if here.get(name))
    yield "processor", f"{here['processor']}, {here.get('cpus')} cores" if here.get("processor") else None
    yield "threads", here.get("threads")
    yield "platform", here.get("platform")
    yield "python", here.get("python")
    yield "libraries", ", ".join(f"{name} {version}" for name, version in (here.get("libraries") or {}).items())
    yield "peak memory", numbers.size(card["peak_memory"]) if card.get("peak_memory") else None


def _run(run: RunFolder) -> Iterator[tuple[str, Any]]:
    card = run.card
    yield "recipe", card.get("recipe")
    yield "status", run.status
    yield "written", card.get("written")
    yield "wall time", numbers.duration(card.get("seconds"))
    cached = [name for name, stage in (card.get("stages") or {}).items() if (stage or {}).get("status") == "cached"]
    yield "from the cache", (", ".join(cached) or "nothing") if card else None
    yield "resume", card.get("resume")
    yield "lock file", "recipe.lock" if (run.path / "recipe.lock").is_file() else None


def wanted(run: RunFolder) -> list[tuple[str, str | None]]:
    """(words, why it was not measured) of everything in `WANTED`; None for what was."""
    measured = [row for row in run.measurements if row.status == "ok"]
    undone = [name for name, stage in (run.card.get("stages") or {}).items() if (stage or {}).get("status") == "not finished"]
    found: list[tuple[str, str | None]] = []
    for beginnings, words, maker in WANTED:
        if any(row.metric.startswith(beginnings) for row in measured):
            found.append((words, None))
            continue
        reason = next((row.reason for row in run.measurements if row.metric.startswith(beginnings) and row.reason), None)
        lost = next((stage for stage in undone if stage.startswith(f"evaluate/{maker.partition(',')[0]}/")), None)
        reason = reason or (f"{lost} did not finish" if lost else None)
        found.append((words, reason or f"no evaluator of this run does; {maker} would"))
    return found


def not_measured(run: RunFolder) -> list[str]:
    """What a reader would look for and no evaluator of this run measured, with the reason."""
    return [f"{words}: {reason}" for words, reason in wanted(run) if reason]


def limits(run: RunFolder) -> list[str]:
    """Caveats that stand beside the numbers: warnings of the plan, an inexact resume, failed stages, what errors do not cover."""
    card = run.card
    found = [str(text) for text in card.get("warnings") or []]
    if card.get("resume") == "inexact":
        found.append(
            f"resumed on another footing ({'; '.join(card.get('resume_changes') or [])}): not bit-identical to an uninterrupted run"
        )
    found += [f"failed: {error.get('what')}" for error in card.get("errors") or []]
    compared = any(row.status == "ok" and row.metric.startswith("pw_mcc") for row in run.measurements)
    if not compared and any(entry.get("trainer") for entry in (card.get("saes") or {}).values() if entry):
        found.append("standard errors are over evaluation sequences; how another training seed would come out was not measured")
    return found


def certificate(run: RunFolder, export: str) -> str:
    """What is known of an export (`saelens/native-k32`): its certificate's outcome and reason; `not verified` where there is none."""
    entry = (run.card.get("exports") or {}).get(export) or {}
    return ": ".join(str(entry[name]) for name in ("outcome", "reason") if entry.get(name)) or "not verified"


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ---------------------------------------------------------------- run_card.md


def markdown(run: RunFolder) -> str:
    """The run card as a Markdown page that is a model card of the Hugging Face hub too: the minimum, verdicts, results by SAE, all facts,
    what is not measured, known limits, SAELens' directory entry."""
    from saehub.report.hub import front_matter, minimum, saelens_entry

    lines = [*front_matter(run), f"# Run card: {_md(run.card.get('recipe') or run.name)}", ""]
    if run.card.get("description"):
        lines += [_md(run.card["description"]), ""]
    lines += _md_verdicts(run)
    lines += ["## At a glance", "", "| | |", "|---|---|", *(f"| {_md(name)} | {_md(value)} |" for name, value in minimum(run)), ""]
    lines += ["## Results", ""]
    tables = groups(run.measurements)
    for group in tables:
        lines += [*_md_group(group), ""]
    if not tables:
        lines += ["Nothing was measured.", ""]
    lines += ["Value ± standard error over evaluation sequences. ↑ higher is better, ↓ lower is better.", ""]
    section = None
    for fact in facts(run):
        if fact.section != section:
            section = fact.section
            lines += ["", f"## {_md(section)}", "", "| | |", "|---|---|"]
        lines.append(f"| {_md(fact.name)} | {_md(fact.value)} |")
    for title, items in (("Not measured", not_measured(run)), ("Known limits", limits(run))):
        lines += ["", f"## {title}", "", *(f"- {_md(item)}" for item in items or ["nothing known"])]
    lines += ["", "## Use", "", "```python", "import saehub"]
    lines += [f"sae = saehub.load({('checkpoints/' + name)!r})" for name in run.checkpoints()]
    lines += ["```", ""]
    entry = saelens_entry(run)
    if entry:
        lines += ["For SAELens' `pretrained_saes.yaml` (fill in the repository):", "", "```yaml", clean(entry).replace("```", "` ` `").rstrip("\n"), "```", ""]
    else:
        lines += ["No entry for SAELens' `pretrained_saes.yaml`: this run wrote no SAELens folder (`export: [{uses: saelens}]` writes one).", ""]
    return "\n".join(lines)


def _md_verdicts(run: RunFolder) -> list[str]:
    from saehub.report.verdicts import COLUMNS, alike, layer_table, verdicts

    said = verdicts(run.measurements)
    if not said:
        return []
    lines = ["## Verdict", ""]
    for one in alike(said):
        flags = f" ({_md(', '.join(one.flags))})" if one.flags else ""
        lines += [f"**{_md(one.sae)}: {_md(one.word)}**{flags}", "", *(f"- {_md(reason)}" for reason in one.reasons)]
        lines += [f"- check next: {_md('; '.join(one.next))}"] if one.next else []
        lines.append("")
    if len(said) > 1:
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        lines += [f"| {' | '.join(map(_md, line))} |" for line in layer_table(run.measurements)]
        lines.append("")
    return lines


def _md_group(group: Group) -> list[str]:
    heads = [_md(dataset_label(name)) for name in group.datasets]
    lines = [
        f"### {_md(group.title)}",
        "",
        f"| metric | | {' | '.join(heads)} | n | definition |",
        "|---|---|" + "---:|" * len(heads) + "---|---|",
    ]
    notes: list[str] = []
    for row in group.rows:
        cells = [_md_cell(row, name, notes) for name in group.datasets]
        lines.append(f"| {_md(row.metric)} | {row.arrow} | {' | '.join(cells)} | {_md(sizes(row))} | {_md(row.definition)} |")
    return [*lines, "", *(f"[{i}] {_md(note)}  " for i, note in enumerate(notes, 1))]


def _md_cell(row: Row, dataset: str | None, notes: list[str]) -> str:
    cell = row.cells.get(dataset)
    if cell is None:
        return ""
    return _md(cell.text) + footnote(cell.remark, notes)


_SPECIAL = str.maketrans({**{letter: f"\\{letter}" for letter in "\\`*_[]|"}, "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " "})


def _md(text: object) -> str:
    """`text` as Markdown shows it: no markup of its own, no line breaks."""
    return clean(text).translate(_SPECIAL)
