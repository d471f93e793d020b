"""`saehub runs …` on invented run folders: listings, comparison, clearing and replay."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.quick


def test_no_runs_yet(saehub):
    said = saehub("runs", "ls")
    assert (said.code, said.out) == (0, "") and "saehub recipe run topk-llama" in said.err
    assert saehub("runs", "ls", "--json").data == {"schema": 1, "runs": []}


def test_ls(saehub, two_runs):
    os.utime(two_runs[0] / "recipe.lock", (1, 1))
    said = saehub("runs", "ls")
    assert [line.split()[0] for line in said.out.splitlines()[2:]] == ["topk-llama-1a2b", "topk-wide-9f8e"]
    assert "finished   2025-10-09 08:53 UTC   2 min 11 s   native-k32" in said.out
    rows = saehub("runs", "ls", "--json").data["runs"]
    assert [set(row) for row in rows] == [{"name", "path", "status", "started", "seconds", "saes"}] * 2


def test_show(saehub, two_runs):
    (two_runs[0] / "report.html").write_text("")
    said = saehub("runs", "show", "topk-llama")
    assert said.code == 0
    for words in (
        "builtin/tiny-llama",
        "160 → 1,280 latents → 160",
        "Not measured",
        "feature absorption",
        "0.1293 ± 0.0021",
        "Known limits",
    ):
        assert words in said.out, words
    assert said.err.endswith(f"report:  {two_runs[0] / 'report.html'}\n")
    data = saehub("runs", "show", two_runs[0] / "run_card.json", "--json").data
    assert set(data) == {"schema", "run", "measurements"} and set(data["run"]) >= {"name", "card", "status"}
    assert len(data["measurements"]) == 31


def test_show_of_an_interrupted_run_says_how_far_it_is_and_how_to_go_on(saehub, home):
    run = home / "runs" / "long-1a2b"
    run.mkdir(parents=True)
    stages = ["tokens/train", "tokens/in_sample", "train/a", "evaluate/native/core/a"]
    events = [
        ("run_started", None, {"stages": stages}),
        ("stage_cached", "tokens/train", {}),
        ("stage_started", "tokens/in_sample", {}),
        ("stage_finished", "tokens/in_sample", {}),
        ("stage_started", "train/a", {}),
        ("progress", "train/a", {"done": 353, "total": 3906, "unit": "steps"}),
        ("interrupted", None, {"error": {"what": "stopped"}}),
    ]
    (run / "events.jsonl").write_text("".join(json.dumps({"kind": k, "stage": s, "data": d, "t": 1e9 + i}) + "\n" for i, (k, s, d) in enumerate(events)))
    (run / "recipe.lock").write_text(json.dumps({"recipe": {"name": "long"}, "command": "saehub recipe run 'my long.yaml' --set seed=3"}))
    said = saehub("runs", "show", "long")
    assert said.code == 0 and "to go on: saehub recipe run 'my long.yaml' --set seed=3" in said.err
    shown = [line.split(maxsplit=1) for line in said.out.splitlines()]
    for line in (
        ["status", "interrupted"],
        ["tokens/train", "cached"],
        ["tokens/in_sample", "finished"],
        ["train/a", "begun: 353 of 3,906 steps"],
        ["evaluate/native/core/a", "not begun"],
    ):
        assert line in shown, line
    for wrong in ("activations from files", "from the cache", "Not measured", "no measurements"):
        assert wrong not in said.out
    data = saehub("runs", "show", "long", "--json").data["run"]
    assert data["stages"]["train/a"].startswith("begun") and data["resume"].startswith("saehub recipe run")
    (run / "recipe.lock").write_text(json.dumps({"recipe": {"name": "long"}}))  # started from Python
    assert f"saehub recipe run {run / 'recipe.yaml'} --out {run}" in saehub("runs", "show", "long").err


def test_show_what_is_not_there(saehub, two_runs):
    said = saehub("runs", "show", "topk-lama-1a2b")
    assert said.code == 2 and "did you mean 'topk-llama-1a2b'?" in said.err
    said = saehub("runs", "show", "topk")
    assert said.code == 2 and "the beginning of 2 runs" in said.err


def test_compare_ranks_what_is_apart_and_nothing_else(saehub, two_runs):
    said = saehub("runs", "compare", "topk-llama", "topk-wide")
    assert said.code == 0
    fvu = next(line for line in said.out.splitlines() if re.match(r"native-k32 → wide-k32\s+fvu\s+in-sample", line))
    assert "0.1293 ± 0.0021" in fvu and "0.1793 ± 0.0021" in fvu
    assert "+0.0500 [0.0442, 0.0558]" in fvu and fvu.endswith("topk-llama-1a2b better")
    data = saehub("runs", "compare", "topk-llama", "topk-wide", "--json").data
    verdicts = {(item["metric"], item["dataset"]): item["verdict"] for item in data["differences"]}
    assert verdicts["fvu", "in_sample"] == "a better"
    assert verdicts["mse", "in_sample"] == "equal"
    assert verdicts["dead_share", "in_sample"] == "not comparable"
    assert "They say nothing about how another training seed would come out." in said.err


def test_saes_of_other_ids_are_compared_as_mapped(saehub, home, fake_run):
    fake_run.write(home / "runs" / "a", saes=("k16", "k32"))
    fake_run.write(home / "runs" / "b", saes=("mine16", "mine32"), worse=0.05)
    said = saehub("runs", "compare", "a", "b", "--map", "k16=mine16", "--map", "k32=mine32")
    assert said.code == 0 and re.search(r"^k16 → mine16\s+fvu\s+in-sample.*a better$", said.out, re.MULTILINE) and "only in" not in said.err
    assert re.search(r"not comparable \[\d\]$", said.out, re.MULTILINE) and "for r0 = 1e-05" in said.out  # a reason that has a colon is told whole
    assert saehub("runs", "compare", "a", "b", "--map", "k16=mine16", "--json").data["pairs"]["k16"] == "mine16"
    crossed = saehub("runs", "compare", "a", "a", "--map", "k16=k32", "--json").data["differences"]
    assert {(*item["subjects_a"], *item["subjects_b"]) for item in crossed} == {("k16", "k32"), ("k32", "k16")}  # none of them with itself
    said = saehub("runs", "compare", "a", "--map", "k16=k32")
    assert said.code == 2 and "--map pairs SAEs of two runs" in said.err


def test_overlap_is_not_ranked(saehub, home, fake_run):
    rows = [dataclasses.replace(row, value=row.value and row.value * 1.005) for row in fake_run.measurements()]
    rows = [dataclasses.replace(row, ci_low=None, ci_high=None) for row in rows]
    fake_run.write(home / "runs" / "a")
    fake_run.write(home / "runs" / "b", rows=rows)
    said = saehub("runs", "compare", "a", "b")
    line = next(line for line in said.out.splitlines() if line.split()[1:2] == ["fvu"])
    assert "not ranked: the 95 % intervals" in line
    assert "better" not in line


def test_the_saes_of_one_run_are_compared_with_each_other(saehub, home, fake_run):
    fake_run.write(home / "runs" / "sweep", saes=("k16", "k32", "k64"))
    said = saehub("runs", "compare", "sweep")
    assert said.code == 0 and re.search(r"^k16 → k64\s+fvu\s+in-sample.*k16 better$", said.out, re.MULTILINE)
    assert "adjusted (Holm) over up to 3 pairs" in said.err
    fake_run.write(home / "runs" / "one")
    assert "no two SAEs at one site" in saehub("runs", "compare", "one").err


def test_compare_needs_numbers(saehub, home, fake_run):
    fake_run.write(home / "runs" / "a")
    fake_run.write(home / "runs" / "b", rows=[])
    said = saehub("runs", "compare", "a", "b")
    assert said.code == 2 and "b has no measurements" in said.err


# ---------------------------------------------------------------- gc


@pytest.fixture()
def store(home, two_runs):
    """A store with what the two runs need, one orphan, one state, and leftovers of a dead and of this process."""
    paths = {}
    for name, where in {
        "tokens": f"tokens/{'12' * 10}", "train": f"train/{'34' * 10}", "orphan": "train/" + "9" * 20, "state": f"state/{'34' * 10}", "old state": "state/" + "8" * 20,
        "dead": "evaluate/.abc.999999999", "alive": f"evaluate/.abd.{os.getpid()}",
    }.items():  # fmt: skip
        paths[name] = home / "store" / where
        paths[name].mkdir(parents=True)
        (paths[name] / "data").write_bytes(b"x" * 1000)
    (home / "store" / "locks").mkdir()
    (home / "store" / "locks" / "x.lock").touch()
    return paths


def test_gc_lists_and_keeps(saehub, store):
    said = saehub("runs", "gc")
    assert said.code == 0
    assert [line.split()[1] for line in said.out.splitlines()[2:]] == [".abc.999999999", "8" * 20, "9" * 20]
    assert "would free 3.0 kB in 3 entries; to remove them: saehub runs gc --yes" in said.err
    assert all(path.exists() for path in store.values())


def test_gc_removes_what_no_run_needs(saehub, store, two_runs):
    data = saehub("runs", "gc", "--yes", "--json").data
    assert (data["removed"], data["bytes"]) == (True, 3000)
    assert set(data["entries"][0]) == {"kind", "path", "bytes", "why"}
    assert {name for name, path in store.items() if path.exists()} == {"tokens", "train", "state", "alive"}
    assert all((run / "results.json").is_file() for run in two_runs)
    said = saehub("runs", "gc")
    assert said.out == "" and "nothing to remove" in said.err


def test_gc_keeps_what_a_run_elsewhere_needs(saehub, store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.lock").write_text(json.dumps({"stages": {"train/x": {"kind": "train", "key": "9" * 64}}}))
    assert "9" * 20 not in saehub("runs", "gc", "--keep", elsewhere).out


def test_gc_counts_only_what_it_frees(saehub, store, two_runs):
    """A file that a run folder shares by hard link stays on the disk."""
    os.link(store["orphan"] / "data", two_runs[0] / "linked")
    assert {entry["path"]: entry["bytes"] for entry in saehub("runs", "gc", "--json").data["entries"]}[str(store["orphan"])] == 0


def test_gc_waits_for_nobody_but_removes_nothing_under_a_run(saehub, store, home):
    from saehub.pipeline.workspace import Store

    with Store(home).lock("run-at-work"):
        said = saehub("runs", "gc", "--yes")
    assert said.code == 4 and "a run is at work" in said.err
    assert store["orphan"].exists()


# ---------------------------------------------------------------- replay


@pytest.fixture()
def replayed(home, monkeypatch, fake_run):
    """Runs `runs replay` with a pipeline that writes what `change(folder)` makes of the same invented run."""
    import saehub.recipe.check  # noqa: F401  (the name `saehub.recipe.check` is also a function)
    from saehub.pipeline import plan as planning
    from saehub.pipeline import run as running

    seen = SimpleNamespace(change=lambda folder: None, base=None, recipe=None)

    def run(plan, listeners=(), *, recipe_text=None, command=None):
        fake_run.write(plan.run_dir)
        (plan.base / "store").mkdir(parents=True)
        seen.change(plan.run_dir)
        return running.RunResult(plan.run_dir, (), {}, 1.0)

    def make_plan(recipe, catalog, *, base=None, out=None, strict_cache=False):
        seen.base, seen.recipe = base, recipe
        return SimpleNamespace(base=base, run_dir=out, stages=[SimpleNamespace(id="train/native-k32", key="34" * 32)], recipe=recipe)

    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(planning, "make_plan", make_plan)
    monkeypatch.setattr(sys.modules["saehub.recipe.check"], "check_text", lambda text, name, overrides, catalog: (text, []))
    fake_run.write(home / "runs" / "r")
    return seen


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_replay_that_is_the_same(saehub, replayed, home):
    said = saehub("runs", "replay", "r")
    assert said.code == 0
    assert "the run replays bit by bit" in said.err and "36 of 36 compared hashes and numbers are identical" in said.err
    assert (home / "replays" / "r" / "results.json").is_file()
    assert replayed.base != home and not replayed.base.exists()  # a store of its own, gone when done


def test_a_replay_with_other_rounding_agrees(saehub, replayed):
    def other(folder):
        edit(folder / "run_card.json", lambda card: card["saes"]["native-k32"].update(tensors_hash="00" * 32))
        edit(folder / "results.json", lambda data: data["measurements"][0].update(value=data["measurements"][0]["value"] + 1e-4))

    replayed.change = other
    said = saehub("runs", "replay", "r")
    assert said.code == 0
    assert "not bit-identical, but every number agrees within its error" in said.err
    assert "tensors   native-k32" in said.out


@pytest.mark.parametrize(("change", "code"), [(1.9, 0), (3.0, 1)])
def test_a_run_resumed_on_another_footing_agrees_within_the_two_errors_and_says_so(saehub, replayed, home, change, code):
    """Paired over sequences, other bits of the weights are another result; as the two numbers state themselves, they are the same."""
    edit(home / "runs" / "r" / "run_card.json", lambda card: card.update(resume="inexact", resume_changes=["threads: 2 -> 1"]))

    def moved(data):  # by standard errors of the difference of two independent numbers
        first = data["measurements"][0]
        first.update(value=first["value"] + change * 2**0.5 * first["stderr"], ci_low=None, ci_high=None)

    replayed.change = lambda folder: edit(folder / "results.json", moved)
    said = saehub("runs", "replay", "r")
    assert said.code == code and "resumed on another footing (threads: 2 -> 1)" in said.err, said.err


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("results.json", lambda data: data["measurements"][0].update(value=0.5, ci_low=0.49, ci_high=0.51), "differs"),
        ("results.json", lambda data: data["measurements"].pop(0), "missing"),
        ("run_card.json", lambda card: card["data"]["train"].update(hash="00"), "differs"),
        ("run_card.json", lambda card: card["model"].update(fingerprint="00"), "differs"),
        ("run_card.json", lambda card: card["saes"].pop("native-k32"), "missing"),
    ],
)
def test_a_replay_that_differs_is_code_1(saehub, replayed, name, change, word):
    replayed.change = lambda folder: edit(folder / name, change)
    said = saehub("runs", "replay", "r")
    assert said.code == 1
    assert word in said.out and "the run does not replay" in said.err


def test_replay_as_json(saehub, replayed, tmp_path):
    said = saehub("runs", "replay", "r", "--json", "--out", tmp_path / "again")
    assert said.code == 0
    last = said.lines[-1]
    assert (last["kind"], last["verdict"], last["replay"]) == ("replay", "identical", str(tmp_path / "again"))
    assert {"what", "name", "verdict", "detail"} == set(last["outcomes"][0])


def failing(folder, why="a was stopped after 10% of its rows: collapsed"):
    """Events of a run whose training failed."""
    events = [("run_started", "", {"stages": ["train/a"]}), ("stage_failed", "train/a", {"error": {"what": why}})]
    (folder / "events.jsonl").write_text("".join(json.dumps({"kind": k, "stage": s or None, "data": d, "t": 2e9 + i}) + "\n" for i, (k, s, d) in enumerate(events)))


@pytest.mark.parametrize(("now", "code", "word"), [("a was stopped after 10% of its rows: collapsed", 0, "identical"), ("the disk is full", 1, "differs")])
def test_a_run_that_failed_is_compared_with_a_replay_that_fails(saehub, replayed, home, monkeypatch, now, code, word):
    from saehub.errors import StageFailed
    from saehub.pipeline import run as running

    finished = running.run

    def run(plan, *args, **more):
        for folder in (plan.base, plan.run_dir):
            shutil.rmtree(folder, ignore_errors=True)
        finished(plan, *args, **more)
        failing(plan.run_dir, now)
        raise StageFailed(now)

    monkeypatch.setattr(running, "run", run)
    said = saehub("runs", "replay", "r")
    assert said.code == 4 and "cannot" not in said.err  # the run itself did not fail: the replay's error is the news
    failing(home / "runs" / "r")
    said = saehub("runs", "replay", "r")
    assert said.code == code and f"the replay failed, as the run did: {now}" in said.err
    outcomes = saehub("runs", "replay", "r", "--json").lines[-1]["outcomes"]
    assert {item["verdict"] for item in outcomes if item["what"] == "failure"} == {word}


def test_a_replay_without_the_plugin_names_its_package(saehub, replayed, home):
    plugins = {"native/topk": {"distribution": "saehub", "version": "0.1.0"}, "house/topk": {"distribution": "saehub-house", "version": "1.2"}}
    edit(home / "runs" / "r" / "recipe.lock", lambda lock: lock.update(plugins=plugins))
    said = saehub("runs", "replay", "r")
    assert said.code == 3 and "provides house/topk" in said.err and "pip install 'saehub-house==1.2'" in said.err


def test_what_cannot_be_replayed(saehub, replayed, home, fake_run):
    (home / "runs" / "r" / "recipe.lock").unlink()
    said = saehub("runs", "replay", home / "runs" / "r" / "run_card.json")
    assert said.code == 2 and "no recipe.lock" in said.err
    run = fake_run.write(home / "runs" / "s")
    said = saehub("runs", "replay", "s", "--out", run)
    assert said.code == 2 and "overwrite" in said.err
