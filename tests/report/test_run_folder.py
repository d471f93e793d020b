"""A run folder is read as far as it goes, and found by name, beginning, path or `last`."""

from __future__ import annotations

import json

import pytest

from saehub.errors import FormatError, UsageError
from saehub.report.run_folder import RunFolder, find

pytestmark = pytest.mark.quick


def test_everything_of_a_finished_run(fake_run, tmp_path):
    run = RunFolder(fake_run.write(tmp_path / "r", ("a", "b")))
    assert run.status == "finished"
    assert run.when == fake_run.T0
    assert list(run.checkpoints()) == ["a", "b"]
    assert list(run.exports()["saelens"]) == ["a", "b"]
    assert run.measurements == fake_run.measurements("a") + fake_run.measurements("b", 0.02)


def test_an_empty_folder_is_an_empty_run(tmp_path):
    run = RunFolder(tmp_path)
    assert (run.status, run.when, run.measurements, run.events, run.checkpoints(), run.exports()) == ("unknown", None, [], [], {}, {})


@pytest.mark.parametrize(
    ("kinds", "written", "status"),
    [
        (["run_started"], None, "unfinished"),
        (["run_started", "interrupted"], None, "interrupted"),
        (["run_started", "interrupted", "run_started"], None, "unfinished"),
        (["run_started", "run_finished"], "finished", "finished"),
        (["run_started", "stage_failed"], "failed", "failed"),
        (["run_started"], "finished", "finished"),  # the page is written before the last event
        (["run_started", "run_finished", "run_started"], "old", "unfinished"),
    ],
)
def test_status_from_the_last_words(tmp_path, kinds, written, status):
    t0 = 1_760_000_000.0
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps({"kind": kind, "stage": None, "data": {}, "t": t0 + 100 * i}) + "\n" for i, kind in enumerate(kinds))
    )
    if written:
        when = "2025-10-09T08:53:25Z" if written == "old" else "2025-10-09T09:53:20Z"
        (tmp_path / "run_card.json").write_text(json.dumps({"status": "finished" if written == "old" else written, "written": when}))
    assert RunFolder(tmp_path).status == status


def test_a_line_cut_by_a_kill_is_passed_over(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "r")
    with open(run / "events.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"kind":"progr')
    assert RunFolder(run).status == "finished"


def test_a_broken_file_is_named(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "r")
    (run / "results.json").write_text('{"measurements": [')
    with pytest.raises(FormatError, match=r"results\.json"):
        RunFolder(run).measurements  # noqa: B018
    (run / "run_card.json").write_text("[]")
    with pytest.raises(FormatError, match="not a JSON object"):
        RunFolder(run).card  # noqa: B018


def test_find(fake_run, tmp_path):
    known = [fake_run.write(tmp_path / name) for name in ("topk-1a", "topk-2b", "gated-3c")]
    assert find("topk-2b", known).path == known[1]
    assert find("gat", known).path == known[2]
    assert find("last", known).path == known[2]
    assert find(str(known[0]), []).path == known[0]
    assert find(str(known[0] / "run_card.json"), []).path == known[0]
    with pytest.raises(UsageError, match="the beginning of 2 runs"):
        find("topk", known)
    with pytest.raises(UsageError, match="did you mean 'gated-3c'"):
        find("gated-3d", known)
    with pytest.raises(UsageError) as caught:
        find(str(tmp_path), [])
    assert "is a folder, but has no" in caught.value.why


DAMAGES = {
    "run_card.json": [("seconds", [1]), ("model", "x"), ("data", -1), ("exports", [1]), ("errors", [1]), ("saes", {"a": {"provenance": 3}}), ("peak_memory", "x"), ("stages", 1.5)],
    "results.json": [("measurements", 1.5), ("measurements", [None]), ("measurements", [-1]), ("measurements", [{"subjects": 3}])],
    "recipe.lock": [("stages", [1]), ("recipe", "x")],
}


@pytest.mark.parametrize(("name", "key", "value"), [(name, *change) for name, changes in DAMAGES.items() for change in changes])
def test_what_saehub_does_not_write_is_refused_with_its_place(fake_run, tmp_path, name, key, value):
    file = fake_run.write(tmp_path / "r") / name
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    run = RunFolder(tmp_path / "r")
    with pytest.raises(FormatError, match=name.replace(".", "\\.")) as error:
        _ = {"run_card.json": lambda: run.card, "results.json": lambda: run.measurements, "recipe.lock": lambda: run.lock}[name]()
    assert error.value.exit_code == 1 and error.value.fix and (key in str(error.value) or "measurement 0" in str(error.value))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"value": "0.5"}, "value is '0.5'"), ({"stderr": [1]}, "stderr"), ({"n": "3"}, "n is '3'"), ({"parts": [1]}, "parts"), ({"better": {}}, "better"),
        ({"status": "fine"}, "status"), ({"subjects": "a"}, "subjects"), ({"subjects": (1,)}, "subjects"), ({"definition": 1}, "definition"), ({"value": None}, "None"),
    ],
)  # fmt: skip
def test_a_measurement_says_what_is_wrong_with_it(fake_run, change, word):
    from dataclasses import replace

    from saehub.errors import StageFailed
    from saehub.pipeline.evaluate import rows_of

    row = fake_run.measurement("fvu", "in_sample", 0.5, 0.1)
    assert row.wrong() is None and rows_of([row], "mine/x") == [row] and word in replace(row, **change).wrong()
    with pytest.raises(StageFailed, match="mine/x") as error:
        rows_of([row, replace(row, **change)], "mine/x")
    assert word in error.value.why


def test_lines_that_are_no_events_are_left_out(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "r")
    before = RunFolder(run).stages()
    with (run / "events.jsonl").open("a") as file:
        file.write('[1]\n{"stage": "x"}\n{"kind": 3}\n{"kind": "progress", "data": 4}\n{"kind": "progress", "t": "x"}\n3\n')
    assert RunFolder(run).stages() == before and RunFolder(run).status == "finished"
