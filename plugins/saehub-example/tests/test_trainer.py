"""The trainer and its architecture in; proof that they keep their promises and compute their equation out."""

from __future__ import annotations

import torch

import saehub
from saehub.testing import check_trainer
from saehub_example import ARCHITECTURE


def small(tau: float = 0.5) -> saehub.SAE:
    """Three latents that read one input dimension each."""
    config = saehub.SAEConfig(ARCHITECTURE, 3, 3, params={"tau": tau})
    return saehub.SAE.build(config, {"W_enc": torch.eye(3), "b_enc": torch.zeros(3), "W_dec": torch.eye(3), "b_dec": torch.zeros(3)})


def test_promises_of_a_trainer():
    check_trainer("example/peak", refuses=[{"tau": 1.0}, {"batch": 0}, {"lr": -1.0}, {"expansion": 0.0}]).raise_if_failed()


def test_the_equation_by_hand():
    x = torch.tensor([[4.0, 2.0, 1.9], [-1.0, -2.0, -3.0]])
    assert small().encode(x).tolist() == [[4.0, 2.0, 0.0], [0.0, 0.0, 0.0]]  # the bar is at 2, and nothing fires below zero
    assert small().margin(x)[0].tolist() == [4.0, 0.0, 0.10000002384185791]


def test_a_checkpoint_comes_back_and_replays_in_float64(tmp_path):
    path = saehub.save(small(), tmp_path / "sae", site="resid_post.0")
    again = saehub.load(path)
    assert again.config == small().config and torch.equal(again.W_dec, small().W_dec)
