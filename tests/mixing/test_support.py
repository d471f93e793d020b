"""The support table of adapters/README.md: it names every trainer, and a run of a part of it (all of it with `-m full`) gives the same cells."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

_spec = spec_from_file_location("saehub_mixing_support", Path(__file__).with_name("support.py"))
support = sys.modules.setdefault("saehub_mixing_support", module_from_spec(_spec))
_spec.loader.exec_module(support)


@pytest.mark.quick
def test_the_table_holds_every_trainer_and_every_cheap_evaluator():
    rows = support.parsed(support.written())
    assert list(rows) == [address for address in support.TRAINERS if address in support.registered("trainer")]
    assert set(rows) == set(support.registered("trainer")), "a trainer is missing: list it in tests/mixing/support.py, then run it with --write"
    for row in rows.values():
        assert list(row) == [address for address in (*support.CHEAP, *support.EXPENSIVE) if address in support.registered("evaluator")]
        assert all(state in (support.RAN, "by its class") or state.startswith("refused: ") for state in row.values())


def test_a_part_of_the_table_is_what_happens_now(tmp_path):
    """One library's trainers of other classes, and a transcoder, under the evaluators of three libraries; dictionary_learning's: `-m full`."""
    trainers = ["native/jumprelu", "saelens/batchtopk", "saelens/matching_pursuit", "sparsify/skip_transcoder"]
    evaluators = ("native/core", "native/health", "native/stability", "saelens/evals")
    _, rows = support.run_all(trainers, {address: (support.CHEAP[address], trainers) for address in evaluators}, tmp_path)
    expected = support.parsed(support.written())
    for trainer in trainers:
        for address in evaluators:
            assert support.cell(rows[address], support.name_of(trainer)).state == expected[trainer][address], (trainer, address)


def test_saebench_core_measures_the_sae_of_every_trainer(tmp_path):
    """Eight steps of every trainer of four libraries, then SAEBench's core on what each left: the column of the table."""
    trainers = [address for address in support.TRAINERS if address in support.registered("trainer")]
    settings = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1, "batch_size_prompts": 4, "seeds": [0]}
    _, rows = support.run_all(trainers, {"saebench/core": (settings, trainers)}, tmp_path)
    expected = support.parsed(support.written())
    for trainer in trainers:
        assert support.cell(rows["saebench/core"], support.name_of(trainer)).state == expected[trainer]["saebench/core"], trainer
        assert expected[trainer]["saebench/core"] == support.RAN or trainer in support.TRANSCODERS


@pytest.mark.full
def test_the_whole_table_is_what_happens_now(tmp_path):
    assert support.markdown(support.table(tmp_path)) == support.written()
