"""Every component that saehub itself registers in; each passes the suite of its kind out. A new component is accepted by passing here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saehub.api import KINDS
from saehub.plugins import catalog
from saehub.testing import check_evaluator, check_exporter, check_extractor, check_trainer
from saehub.testing.saes import random_sae
from saehub.testing.stage import Stage

CHECKS = {"extractor": check_extractor, "trainer": check_trainer, "evaluator": check_evaluator, "exporter": check_exporter}
OURS = [item.address for kind in KINDS for item in catalog().components(kind).values() if item.distribution == "saehub"]
KIND = {item.address: kind for kind in KINDS for item in catalog().components(kind).values()}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """One tiny model and its texts for the module."""
    return Stage(tmp_path_factory.mktemp("stage"))


def stored_activations(folder: Path) -> dict:
    """Settings for `native/files`: 24 sequences of 8 positions at two sites."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    tensors = {"resid_post.0": torch.randn(24, 8, 12, generator=draw), "mlp_out.0": torch.randn(24, 8, 20, generator=draw)}
    save_file({**tensors, "token_ids": torch.arange(24 * 8).reshape(24, 8) % 50}, folder / "rows.safetensors")
    return {"with_": {"path": str(folder), "exclude_ids": [0]}, "sites": ["resid_post.0", "mlp_out.0"]}


# What a component needs in order to be tried: settings without defaults, and what it must refuse. Others are tried as they are.
TRAIN = {"batch": 256, "width": 96}
ARGUMENTS = {
    "native/topk": lambda tmp: {"with_": {**TRAIN, "k": 4}, "refuses": [{"k": 1000}, {"k": 0}, {"lr": -1.0}, {"expansion": 4.0}, {"warmup": 2.0}]},
    "native/files": lambda tmp: stored_activations(tmp / "activations"),
}


def test_every_kind_has_a_component_of_ours():
    assert {KIND[address] for address in OURS} == set(KINDS)


def test_arguments_name_components_that_exist():
    assert set(ARGUMENTS) <= set(OURS)


@pytest.mark.parametrize("address", OURS)
def test_component(address, stage, tmp_path):
    kind = KIND[address]
    arguments = ARGUMENTS.get(address, lambda tmp: {})(tmp_path)
    if kind in ("extractor", "evaluator"):
        arguments["stage"] = stage
    report = CHECKS[kind](address, **arguments)
    assert report.ok, f"\n{report}"


def test_the_saelens_exporter_says_what_it_can_and_refuses_the_rest():
    """The architectures of SAELens 6 go through; those it has no class for are refused by name, not approximated."""
    exporter = catalog().find("exporter", "saelens").load()(None)
    assert exporter.refusal(random_sae("topk")) is None and exporter.refusal(random_sae("jumprelu")) is None
    assert exporter.refusal(random_sae("groupmax"))
