"""States on disk: exact, newest first, and a broken one is passed over, not trusted."""

import pytest
import torch

from saehub.pipeline.resume import KEPT, State, load_state, save_state

pytestmark = pytest.mark.quick


def state(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(7, 3, generator=generator), "m": torch.randn(7, dtype=torch.float64, generator=generator)}
    block = torch.randn(11, 4, generator=generator)
    return State(step, tensors, {"step": step, "name": "x"}, {"x": block[5:]}, {"threads": 2})


def test_round_trip_and_rotation(tmp_path):
    for step in (3, 7, 12):
        save_state(tmp_path, state(step))
    assert len(list(tmp_path.glob("step-*"))) == KEPT and not list(tmp_path.glob(".*"))
    found, skipped = load_state(tmp_path)
    assert not skipped and (found.step, found.data, found.environment) == (12, {"step": 12, "name": "x"}, {"threads": 2})
    expected = state(12)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert torch.equal(found.carry["x"], expected.carry["x"])


@pytest.mark.parametrize("damage", ["truncate", "flip", "no json", "bad json"])
def test_broken_newest_state_falls_back(tmp_path, damage):
    save_state(tmp_path, state(3))
    newest = save_state(tmp_path, state(7))
    tensors = newest / "state.safetensors"
    raw = bytearray(tensors.read_bytes())
    if damage == "truncate":
        tensors.write_bytes(raw[:-5])
    elif damage == "flip":
        raw[-3] ^= 1
        tensors.write_bytes(raw)
    elif damage == "no json":
        (newest / "state.json").unlink()
    else:
        (newest / "state.json").write_text('{"step": 7')
    found, skipped = load_state(tmp_path)
    assert found.step == 3 and len(skipped) == 1 and newest.name in skipped[0]
