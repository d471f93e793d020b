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
