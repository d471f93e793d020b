"""The exporter in; proof that it keeps its promises out: round trips bit-exact, damage and what it cannot say refused."""

from __future__ import annotations

import pytest
import torch

import saehub
from saehub.testing import check_exporter
from saehub.testing.saes import random_sae


def test_promises_of_an_exporter():
    check_exporter("example/folio").raise_if_failed()


def test_conversion_with_a_certificate(tmp_path):
    saehub.save(random_sae("topk"), tmp_path / "sae", site="resid_post.0")
    certificate = saehub.convert(tmp_path / "sae", tmp_path / "folio", to="example/folio")
    assert certificate.outcome == "verified against the published equation"
    assert torch.equal(saehub.load(tmp_path / "folio").W_enc, random_sae("topk").W_enc)


def test_what_it_cannot_say_is_refused(tmp_path):
    saehub.save(random_sae("jumprelu"), tmp_path / "sae", site="resid_post.0")
    with pytest.raises(saehub.SaehubError, match="jumprelu"):
        saehub.convert(tmp_path / "sae", tmp_path / "folio", to="example/folio")
