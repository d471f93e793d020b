"""Components in worker processes: values cross exactly, errors keep their words, a death is a failed stage, stdout stays ours."""

import os
import time

import pytest
import torch

from saehub.api import CalibrationRows, Job
from saehub.errors import StageFailed, UsageError
from saehub.pipeline.components import Components
from saehub.plugins import catalog


@pytest.mark.quick
def test_worker_round_trip(toy_plugin, capfd):
    with Components() as components:
        echo = components.make(catalog().find("exporter", "toyplug/echo"), None)
        facts = echo.environment()
        assert facts["pid"] != os.getpid() and facts["setting"] == "seen"
        x = torch.randn(5, 3, dtype=torch.float64)
        y, info = echo.double(x, factor=3)
        assert torch.equal(y, x * 3) and y.dtype == torch.float64 and info == [{"shape": (5, 3)}]
        assert echo.rows() == [{"i": 0}, {"i": 1}, {"i": 2}]

        with pytest.raises(StageFailed) as failure:
            echo.fail()
        assert "the library's own words" in str(failure.value) and "RuntimeError" in str(failure.value)
        with pytest.raises(UsageError) as refusal:  # our own errors arrive as what they were
            echo.refuse()
        assert refusal.value.fix == "do this" and refusal.value.exit_code == 2
        assert echo.environment()["pid"] == facts["pid"], "an error must not end the worker"

        trainer = components.make(catalog().find("trainer", "sgd"), None)
        job = Job("j", "s", None, 3, 3, 10, 2, 20, 0)
        session = trainer.open(job, CalibrationRows(torch.ones(8, 3)))
        rows = torch.randn(6, 3)
        metrics = session.steps(rows, None, 2)
        expected = torch.ones(3)
        for start in range(0, 6, 2):
            expected = expected - 0.1 * rows[start : start + 2].mean(0)
        tensors, data = session.state()
        assert torch.equal(tensors["w"], expected) and data == {"n": 3} and metrics["steps"] == 3
        assert trainer.open(job, CalibrationRows(torch.ones(8, 3))).load_state(tensors, data) is None

        other = trainer.open(job, CalibrationRows(torch.zeros(8, 3)))
        del session
        assert torch.equal(other.state()[0]["w"], torch.zeros(3)), "a session that was let go takes no other with it"
        assert not echo._worker.released and other.offers("step")
        assert other._ref not in (trainer._ref, echo._ref)

        with pytest.raises(StageFailed) as death:
            echo.die(7)
        assert "exit code 7" in death.value.what and "last words" in death.value.said
        again = components.make(catalog().find("exporter", "toyplug/echo"), None)
        assert again.environment()["pid"] != facts["pid"], "a new worker takes the place of a dead one"
        pid = again.environment()["pid"]
    deadline = time.time() + 10
    while time.time() < deadline and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}"), "closing ends the worker"
    assert capfd.readouterr().out == "", "what a library prints must not reach our stdout"
