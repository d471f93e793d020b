"""TensorBoard and W&B files, read back with their own libraries, hold the event stream's and results.json's numbers under the same names."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from saehub.errors import MissingDependency, UsageError
from saehub.pipeline.events import Event, read_events
from saehub.report import loggers
from saehub.report.loggers import Logger


@pytest.fixture
def stream(fake_run, tmp_path):
    """The events of a finished run of two trainings, and its folder."""
    run = fake_run.write(tmp_path / "run", ("a", "b"))
    events = read_events(run / "events.jsonl")
    started = Event("run_started", None, {"recipe": "topk-llama", "run_dir": str(run)})
    return run, [started, *events[1:]]


def expected(run: Path, events: list[Event]) -> tuple[dict, dict]:
    """(curve name -> {step: value}, result name -> value), read from the files by hand."""
    curves: dict[str, dict[int, float]] = {}
    for event in events:
        if event.kind == "progress":
            for name, value in event.data["metrics"].items():
                curves.setdefault(f"{event.stage}/{name}", {})[event.data["rows"]] = value
    rows = json.loads((run / "results.json").read_text())["measurements"]
    results = {f"{row['subjects'][0]}/{row['dataset'] or 'weights'}/{row['metric']}": row["value"] for row in rows if row["status"] == "ok"}
    return curves, results


def log_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of W&B's file: LevelDB's log format (blocks of 32 KiB; crc 4, length 2, type 1; first, middle and last parts) after 7 bytes."""
    at, held = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield held
            held = b""


def test_tensorboard(stream):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, events = stream
    logger = Logger("tensorboard")
    for event in [*events[:150], *events[100:]]:  # a resumed run tells some steps twice
        logger(event)
    curves, results = expected(run, events)
    read = EventAccumulator(str(run / "logs" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert set(read.Tags()["scalars"]) == set(curves) | set(results)
    for name, points in curves.items():
        told = read.Scalars(name)
        assert [point.step for point in told] == list(points)
        assert [point.value for point in told] == pytest.approx(list(points.values()), rel=1e-6)
    assert {name: read.Scalars(name)[0].value for name in results} == pytest.approx(results, rel=1e-6)


def test_wandb_offline(stream, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    from wandb.proto import wandb_internal_pb2

    run, events = stream
    logger = Logger("wandb")
    for event in [*events[:20], events[-1]]:
        logger(event)
    (file,) = (run / "logs").rglob("*.wandb")
    records: list = []
    for _ in range(600):  # W&B's own process writes the file a moment after `finish`
        records = [wandb_internal_pb2.Record.FromString(data) for data in log_records(file.read_bytes())]
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    rows = []
    for record in records:
        if record.HasField("history"):
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    curves, results = expected(run, events[:20])
    told = {name: value for row in rows for name, value in row.items() if not name.startswith("_") and name != "tokens"}
    assert set(told) == set(curves) | set(results)
    assert {name: told[name] for name in results} == pytest.approx(results)
    losses = {row["tokens"]: row["train/a/loss"] for row in rows if "train/a/loss" in row}
    assert losses == pytest.approx(curves["train/a/loss"])


@pytest.mark.quick
def test_what_cannot_log_is_refused_before_a_run(monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        Logger("tensorbord")
    monkeypatch.setattr(loggers.TensorBoard, "library", "no_such_library")
    with pytest.raises(MissingDependency) as caught:
        Logger("tensorboard")
    assert caught.value.fix == "pip install 'saehub[loggers]'"


@pytest.mark.quick
def test_a_run_that_fails_or_never_began_is_closed_without_results(stream, monkeypatch):
    class Sink:
        library = "json"

        def __init__(self, run_dir, recipe):
            self.told, self.closed = [], 0
            made.append(self)

        def put(self, scalars, step):
            self.told.append((step, scalars))

        def close(self):
            self.closed += 1

    made: list[Sink] = []
    monkeypatch.setitem(loggers.SINKS, "tensorboard", Sink)
    run, events = stream
    never = Logger("tensorboard")
    never.close()
    failed = Logger("tensorboard")
    for event in events[:10]:
        failed(event)
    failed.close()
    failed.close()
    (sink,) = made
    assert sink.closed == 1 and all(name.startswith("train/") for _, scalars in sink.told for name in scalars)
