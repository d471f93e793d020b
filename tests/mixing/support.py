"""Every trainer and every evaluator in; the table of which pairs ran on the embedded model, and why others did not, out.

`python tests/mixing/support.py` prints the table of adapters/README.md, `--write` puts it there. All trainers are trained in one pass for
a few steps; all SAEs are measured by every cheap evaluator; an expensive one measures one SAE of each class (architecture, kind, norms).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "adapters" / "README.md"
BEGIN, END = "<!-- support: python tests/mixing/support.py --write -->", "<!-- end of the support table -->"
SITE, ACROSS = "mlp_out.2", ("mlp_in.2", "mlp_out.2")
SIZE = {"width": 320, "batch": 256}
K, L0, L1 = {"k": 8}, {"target_l0": 8.0}, {"l1_coefficient": 0.1}
TRAINERS: dict[str, dict[str, Any]] = {
    **{f"native/{word}": K for word in ("topk", "batchtopk", "matryoshka_batchtopk", "abstopk", "groupmax")},
    **{f"native/{word}": L0 for word in ("relu", "jumprelu", "gated")},
    **{f"saelens/{word}": L1 for word in ("standard", "gated")},
    **{f"saelens/{word}": K for word in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")},
    "saelens/jumprelu": {"l0_coefficient": 0.01},
    "saelens/matching_pursuit": {"max_iterations": 8},
    **{f"sparsify/{word}": K for word in ("topk", "groupmax", "multi_topk", "transcoder", "skip_transcoder")},
    "sparsify/end_to_end": {**K, "optimizer": "adam"},
    **{f"dictionary_learning/{word}": K for word in ("topk", "batch_topk", "matryoshka_batch_topk")},
    "dictionary_learning/jump_relu": L0,
    **{f"dictionary_learning/{word}": {} for word in ("standard", "standard_april", "gated")},
    **{f"dictionary_learning/{word}": {"p_end": 0.5, "n_sparsity_updates": 2} for word in ("p_anneal", "gated_anneal")},
}
"""Trainer -> settings beside SIZE."""
TRANSCODERS = ("sparsify/transcoder", "sparsify/skip_transcoder")
CHEAP: dict[str, dict[str, Any]] = {
    "native/core": {"loss_sequences": 8, "baselines": False},
    "native/health": {},
    "native/stability": {"nulls": False},
    "native/verdict": {},
    "saelens/evals": {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2},
    "dictionary_learning/evaluate": {"loss_sequences": 8, "max_rows": 512},
    "saebench/core": {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2, "batch_size_prompts": 8, "seeds": [0, 1]},
}
EXPENSIVE: dict[str, dict[str, Any]] = {
    "saebench/meta_structure": {"train_steps": 50, "seeds": [0, 1]},
    "saebench/sae_probes": {"dataset_names": ["5_hist_fig_ismale"], "ks": [1], "max_seq_len": 64, "include_llm_baseline": False, "seeds": [0, 1]},
}
REFERENCE = {False: "reference", True: "reference-across"}
"""Ids of one more autoencoder and one more transcoder (native/topk, another seed), for evaluators that compare two."""
RAN, IMPLIED = "ran", "implied by its SAE class"


@dataclass(frozen=True)
class Cell:
    """One trainer's SAE under one evaluator."""

    state: str
    """`ran`, `implied by its SAE class`, or `refused: why`."""
    measured: int = 0
    """Rows with a value."""


def registered(kind: str) -> list[str]:
    """Addresses of this distribution's components of a kind."""
    from saehub.plugins import catalog

    return [item.address for item in catalog().components(kind).values() if item.distribution == "saehub"]


def name_of(address: str) -> str:
    """A trainer's id in the recipe."""
    return address.replace("/", "-").replace("_", "-")


def recipe(trainers: Iterable[str], evaluators: dict[str, tuple[dict, list[str]]]) -> dict[str, Any]:
    """The recipe as data: every trainer on one stream, every evaluator on the trainers named beside it."""
    sites = {False: {"site": SITE}, True: {"site": ACROSS[0], "target_site": ACROSS[1]}}
    train = [{"id": name, "uses": "native/topk", **sites[across], "seed": 1, "with": {**SIZE, **K}} for across, name in REFERENCE.items()]
    for address in trainers:
        site = sites[address in TRANSCODERS]
        train.append({"id": name_of(address), "uses": address, **site, "with": {**SIZE, **TRAINERS[address]}})
    evaluate = []
    for address, (settings, subjects) in evaluators.items():
        if address == "native/stability":
            evaluate += [{"id": f"with-{name_of(s)}", "uses": address, "with": settings, "saes": [REFERENCE[s in TRANSCODERS], name_of(s)]} for s in subjects]
        else:
            evaluate.append({"id": name_of(address), "uses": address, "with": settings, "saes": [name_of(s) for s in subjects]})
    text = {"source": "builtin/python-docs", "tokens": 1_500}
    return {
        "saehub": 1,
        "name": "mixing",
        "model": {"name": "builtin/tiny-llama", "device": "cpu"},
        "data": {
            "train": {"source": "builtin/python-docs", "tokens": 8 * SIZE["batch"], "context": 32},
            "eval": {"in_sample": text, "out_of_sample": {**text, "source": "builtin/python-code"}},
        },
        "extract": {"sites": list(ACROSS), "lm_batch": 32, "block": 4096, "calibration": 1024, "store": "none"},
        "train": train,
        "evaluate": evaluate,
    }


def class_of(checkpoint: Path) -> tuple:
    """(architecture, kind, norms) of a checkpoint."""
    header = json.loads((checkpoint / "saehub.json").read_text())
    return tuple(header[name] for name in ("architecture", "kind", "norm_in", "norm_out"))


def run_all(trainers: Collection[str], evaluators: dict[str, tuple[dict, list[str]]], home: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Plan and run; returns trainer -> class, and evaluator -> its rows (a stage that fails is an error)."""
    import yaml

    from saehub.pipeline.plan import make_plan
    from saehub.pipeline.run import run
    from saehub.plugins import catalog
    from saehub.recipe import check_text

    parsed, problems = check_text(yaml.safe_dump(recipe(trainers, evaluators)), "mixing.yaml")
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    assert not errors, "\n".join(errors)
    done = run(make_plan(parsed, catalog(), base=home))
    classes = {address: class_of(Path(done.checkpoints[name_of(address)])) for address in trainers}
    rows: dict[str, list[dict]] = {address: [] for address in evaluators}
    for row in done.results:
        rows[row["evaluator"]].append(row)
    return classes, rows


def cell(rows: list[dict], subject: str) -> Cell:
    """What an evaluator's rows say of one SAE: some values make it `ran`; none and a reason make it `refused`."""
    own = [row for row in rows if subject in row["subjects"]]
    assert own, f"no row about {subject}, not even one that says why not"
    on_data = [row for row in own if row["dataset"] is not None]  # what is said of the weights alone holds for any SAE
    measured = sum(row["status"] == "ok" for row in on_data or own)
    if measured:
        return Cell(RAN, measured)
    reasons = list(dict.fromkeys(row["reason"] for row in own if row["status"] != "ok" and row["reason"]))
    assert reasons, f"nothing measured of {subject}, and no reason"
    return Cell(f"refused: {reasons[0]}")


def table(home: Path, expensive: bool = True) -> dict[str, dict[str, Cell]]:
    """Trainer -> evaluator -> cell, of everything that is registered and listed here."""
    trainers = [address for address in TRAINERS if address in registered("trainer")]
    known = registered("evaluator")
    cheap = {address: (settings, trainers) for address, settings in CHEAP.items() if address in known}
    classes, rows = run_all(trainers, cheap, home)
    cells = {trainer: {address: cell(rows[address], name_of(trainer)) for address in cheap} for trainer in trainers}
    if not expensive:
        return cells
    first = {kind: trainer for trainer, kind in reversed(classes.items())}  # the first trainer of each class stands for it
    costly = {address: (settings, list(first.values())) for address, settings in EXPENSIVE.items() if address in known}
    _, rows = run_all(trainers, costly, home)
    for trainer in trainers:
        for address in costly:
            stands = first[classes[trainer]]
            found = cell(rows[address], name_of(stands))
            cells[trainer][address] = found if stands == trainer or found.state != RAN else Cell(IMPLIED)
    return cells


def markdown(cells: dict[str, dict[str, Cell]]) -> str:
    """The table with numbered reasons below it."""
    columns = list(next(iter(cells.values())))
    reasons: dict[str, int] = {}
    lines = [f"| trainer | {' | '.join(f'`{name}`' for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for trainer, row in cells.items():
        shown = []
        for name in columns:
            state = row[name].state
            if state.startswith("refused"):
                state = f"refused {reasons.setdefault(state.removeprefix('refused: '), len(reasons) + 1)}"
            shown.append("by its class" if state == IMPLIED else state)
        lines.append(f"| `{trainer}` | {' | '.join(shown)} |")
    counts = {word: sum(c.state.startswith(word) for row in cells.values() for c in row.values()) for word in (RAN, "implied", "refused")}
    lines += ["", f"{sum(counts.values())} pairs: {counts[RAN]} ran, {counts['implied']} implied by their SAE class, {counts['refused']} refused.", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def written() -> str:
    """The table as it stands in adapters/README.md."""
    text = README.read_text(encoding="utf-8")
    return re.search(re.escape(BEGIN) + r"\n+(.*?)\n*" + re.escape(END), text, flags=re.DOTALL)[1] + "\n"


def parsed(text: str) -> dict[str, dict[str, str]]:
    """Trainer -> evaluator -> `ran`, `by its class` or `refused: why`, of a table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = re.findall(r"`([^`]+)`", lines[0])
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, flags=re.MULTILINE))
    found = {}
    for line in lines[2:]:
        trainer, *states = (part.strip() for part in line.strip("|").split("|"))
        found[trainer.strip("`")] = {
            name: f"refused: {reasons[state.removeprefix('refused ')]}" if state.startswith("refused") else state
            for name, state in zip(columns, states, strict=True)
        }
    return found


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table in adapters/README.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        text = markdown(table(Path(home)))
    if not options.write:
        sys.stdout.write(text)
        return
    whole = README.read_text(encoding="utf-8")
    README.write_text(re.sub(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", lambda m: f"{m[1]}\n{text}\n{m[2]}", whole, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
