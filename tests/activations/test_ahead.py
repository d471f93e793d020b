"""Blocks made in the background are those made in turn; reading a model in two threads at once mixes nothing up."""

from __future__ import annotations

import threading

import pytest
import torch

from saehub.activations import taps
from saehub.activations.ahead import Ahead
from saehub.sites import Tap

pytestmark = pytest.mark.quick


def test_each_block_once_in_order_and_at_most_one_ahead():
    made, used = [], []

    def make(number: int) -> int:
        assert number <= len(used) + 1, "more than one block ahead"
        made.append(number)
        return 10 * number

    ahead = Ahead(make, 6)
    for number in range(6):
        assert ahead.take(number) == 10 * number
        used.append(number)
    ahead.close()
    assert made == list(range(6))


def test_any_number_may_come_next_and_an_error_is_raised_where_its_block_is_taken():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("block 2")
        return number

    ahead = Ahead(make, 9)
    assert [ahead.take(number) for number in (0, 7, 3, 1)] == [0, 7, 3, 1]
    with pytest.raises(ValueError, match="block 2"):
        ahead.take(2)
    assert ahead.take(3) == 3
    ahead.close()


def test_taps_act_in_their_own_thread_only():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), *(torch.nn.Linear(16, 16) for _ in range(6)))
    tokens = {name: torch.randint(0, 50, (4, 8)) for name in ("here", "there")}
    where = {"here": {"a": Tap("2", "out"), "b": Tap("5", "in")}, "there": {"a": Tap("2", "out"), "c": Tap("6", "out")}}
    alone = {name: taps.read(model, tokens[name], where[name]) for name in tokens}
    wrong = []

    def read(name: str) -> None:
        for _ in range(150):
            found = taps.read(model, tokens[name], where[name])
            wrong.extend(site for site, x in found.items() if not torch.equal(x, alone[name][site]))

    other = threading.Thread(target=read, args=("there",))
    other.start()
    read("here")
    other.join()
    assert not wrong
