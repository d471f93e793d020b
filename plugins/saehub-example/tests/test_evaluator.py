"""The evaluator in; proof that it keeps its promises and measures what it says out."""

from __future__ import annotations

import pytest
import torch

from saehub.testing import check_evaluator
from saehub.testing.saes import random_sae
from saehub_example.evaluate import Dominance
from saehub_example.evaluate_config import DominanceConfig


def test_promises_of_an_evaluator():
    check_evaluator("example/dominance", {"top": 2}).raise_if_failed()


def test_shares_against_plain_numpy():
    from types import SimpleNamespace

    sae, x = random_sae("relu"), torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    found = dict(Dominance(DominanceConfig(top=3))._shares(SimpleNamespace(sae=sae), x, torch.ones(40, dtype=torch.bool), torch.arange(40)))
    features = sae.encode(x).double().numpy()
    for row, share in found.items():
        assert share == pytest.approx(sum(sorted(features[row])[-3:]) / features[row].sum(), rel=1e-12)
    assert len(found) == 40
