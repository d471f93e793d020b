"""The zoo of SAEs with planted failures in; how often `native/verdict` names the failure, on runs that its rules were not set on, out.

    python tests/benchmarks/verdict_zoo.py FILE.jsonl --train [--half test]    trains and measures what FILE.jsonl does not hold yet
    python tests/benchmarks/verdict_zoo.py FILE.jsonl [--json OUT]             judges the stored evidence: table, macro-F1, early verdicts
    python tests/benchmarks/verdict_zoo.py FILE.jsonl --again 480,10 320,0     trains the stored runs of a width and seed again, and compares

Each line of FILE.jsonl is one run: its fault, the verdict that it deserves, and the evidence measured at 10 % of the rows and at the end.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from saehub.api import Measurement
from saehub_native.verdict.evidence import Evidence, gather
from saehub_native.verdict.rules import Judgement, judge


def plain(evidence: Evidence) -> dict:
    """What was measured, as JSON: numbers to 6 digits, without the rows that they came from."""
    found = {field.name: getattr(evidence, field.name) for field in fields(evidence) if field.name != "sources"}
    known = {name: value for name, value in found.items() if value is not None and not (isinstance(value, tuple) and not value)}
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in known.items()}


def judged(run: dict, when: str) -> Judgement:
    """The verdict on a stored run, `early` or `final`."""
    data = {**run[when], "broken": tuple(run[when].get("broken", ()))}
    return judge(Evidence(**data))


def macro_f1(pairs: list[tuple[str, str]]) -> float:
    """Mean over the true classes of 2 TP / (2 TP + FP + FN), for (true, said) pairs; `undecided` counts as wrong."""
    scores = []
    for word in sorted({true for true, _ in pairs}):
        tp = sum(true == said == word for true, said in pairs)
        wrong = sum((true == word) != (said == word) for true, said in pairs)
        scores.append(2 * tp / (2 * tp + wrong))
    return sum(scores) / len(scores)


def latents_of(rows: list[Measurement]) -> int:
    """Width of the measured dictionary."""
    return next(row.parts["latents"] for row in rows if row.metric == "expansion")


def report(runs: list[dict]) -> dict:
    """Prints the tables; returns the numbers."""
    found: dict = {"runs": len(runs)}
    lines = [(run, *(judged(run, when) for when in ("early", "final"))) for run in runs]
    print(f"{'fault':44} {'width':>5} {'seed':>4} {'half':>5}  {'deserved':17} {'at 10 %':17} {'at the end':17} rule")
    for run, early, final in lines:
        print(f"{run['fault']:44} {run['width']:5} {run['seed']:4} {run['half']:>5}  {run['label']:17} {early.verdict:17} {final.verdict:17} {final.rule}")
    for half in ("set", "test"):
        chosen = [line for line in lines if line[0]["half"] == half]
        if not chosen:
            continue
        pairs = [(run["label"], final.verdict) for run, _, final in chosen]
        found[half] = {"runs": len(pairs), "macro_f1": macro_f1(pairs), "right": sum(true == said for true, said in pairs)}
        print(f"\n{half} half: {found[half]['right']} of {len(pairs)} right, macro-F1 {found[half]['macro_f1']:.3f}")
        for (true, said), count in sorted(Counter(pairs).items()):
            print(f"    {true:17} -> {said:17} {count}")
    said = [(early, final) for _, early, final in lines]
    same = sum(early.verdict == final.verdict for early, final in said)
    doomed = [(early, final) for early, final in said if early.doomed]
    wrong = sum(final.verdict in ("good", "undecided") for _, final in doomed)
    found["early"] = {"same": same, "of": len(said), "doomed": len(doomed), "doomed_but_fine": wrong}
    print(f"\nat 10 % of the rows: the verdict of the end in {same} of {len(said)} runs; {len(doomed)} were called doomed, {wrong} of them ended good or undecided")
    return found


def again(file: Path, wanted: list[str]) -> None:
    """Train the stored runs of these widths and seeds again, and print by how much any of their numbers differs."""
    held = {(run["fault"], run["width"], run["seed"]): run for run in map(json.loads, file.read_text().splitlines())}
    places = {tuple(map(int, pair.split(","))) for pair in wanted}
    with TemporaryDirectory() as folder:
        fresh = Path(folder) / "again.jsonl"
        train(fresh, None, places, set(held))
        found = [json.loads(line) for line in fresh.read_text().splitlines()]
    equal = verdicts = 0
    for run in found:
        stored = held[run["fault"], run["width"], run["seed"]]
        apart = [
            (abs(run[when].get(name, 0) - stored[when].get(name, 0)), f"{name} ({when}) {stored[when].get(name)} -> {run[when].get(name)}")
            for when in ("early", "final")
            for name in run[when].keys() | stored[when].keys()
            if run[when].get(name) != stored[when].get(name) and not isinstance(run[when].get(name, stored[when].get(name)), (str, list))
        ]
        same = all(judged(run, when).verdict == judged(stored, when).verdict for when in ("early", "final"))
        equal, verdicts = equal + (not apart), verdicts + same
        if apart:
            print(f"{run['fault']}, {run['width']}, seed {run['seed']}: {len(apart)} numbers differ, most of all {max(apart)[1]}; verdicts {'the same' if same else 'differ'}")
    print(f"{equal} of {len(found)} runs gave the stored numbers in all 6 digits; {verdicts} of {len(found)} the stored verdicts, early and final")


def train(file: Path, only: str | None, places: set[tuple[int, int]] | None = None, known: set[tuple] | None = None) -> None:
    """Train and measure every run that `file` does not hold: of one half, if `only` names it; of some widths and seeds, if `places` does; of the
    (fault, width, seed) in `known`. Runs of one width, seed, site and text are measured together.
    """
    import torch

    from tests.benchmarks import zoo

    torch.set_num_threads(1)
    held = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(run["fault"], run["width"], run["seed"]) for run in held}
    groups: dict[tuple, list[dict]] = {}
    for run in zoo.runs():
        name, place = (run["fault"], run["width"], run["seed"]), (run["width"], run["seed"])
        if name not in done and only in (None, run["half"]) and (places is None or place in places) and (known is None or name in known):
            groups.setdefault((*(run[name] for name in ("half", "width", "seed", "site", "k")), zoo.PLANTED[run["fault"]].text), []).append(run)
    with TemporaryDirectory() as folder, open(file, "a", encoding="utf-8") as out:
        worlds = {half: zoo.world_of(half, Path(folder)) for half in zoo.ROWS}
        for (half, width, seed, site, k, text), runs in groups.items():
            world = worlds[half]
            saes = {run["fault"]: zoo.trained(world, run["fault"], width, seed, site, k) for run in runs}
            found: dict[str, dict] = {run["fault"]: {} for run in runs}
            for when in ("early", "final"):
                measured = zoo.measure(world, {name: pair[when] for name, pair in saes.items()}, site, text, when == "early", 24)
                for name, rows in measured.items():
                    found[name][when] = plain(gather(rows, latents=latents_of(rows), d_in=world.model.shape.d_model))
            for run in runs:
                out.write(json.dumps({**run, "label": zoo.PLANTED[run["fault"]].label, **found[run["fault"]]}) + "\n")
                print(run["fault"], width, seed, flush=True)
            out.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--half", choices=("set", "test"))
    parser.add_argument("--again", nargs="+", metavar="WIDTH,SEED")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.again:
        return again(options.file, options.again)
    if options.train:
        return train(options.file, options.half)
    found = report([json.loads(line) for line in options.file.read_text().splitlines()])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
