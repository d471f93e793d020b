"""Measurements become one table an SAE, with the datasets beside each other and nothing left out."""

from __future__ import annotations

import pytest

from saehub.api import Measurement
from saehub.report import table

pytestmark = pytest.mark.quick


def row(metric="fvu", dataset="in_sample", value=0.5, stderr=0.01, subjects=("a",), **more):
    known = {"evaluator": "native/core", "definition": "saehub.fvu/1", "site": "resid_post.2", "better": "lower", "n": 100}
    return Measurement(metric=metric, dataset=dataset, value=value, stderr=stderr, subjects=subjects, **{**known, **more})


def test_datasets_stand_beside_each_other_in_sample_first():
    (only,) = table.groups([row(dataset="other"), row(dataset="out_of_sample", value=0.7), row(dataset="in_sample")])
    assert only.datasets == ("in_sample", "out_of_sample", "other")
    (line,) = only.rows
    assert [line.cells[name].text for name in only.datasets] == ["0.500 ± 0.010", "0.700 ± 0.010", "0.500 ± 0.010"]
    assert line.arrow == "↓"
    assert table.dataset_label("out_of_sample") == "out-of-sample"


def test_every_measurement_is_in_exactly_one_cell():
    measured = [
        row(metric=metric, dataset=dataset, subjects=(sae,), evaluator=maker)
        for metric in ("fvu", "l0")
        for dataset in ("x", "y", None)
        for sae in "ab"
        for maker in ("p/q", "r/s")
    ]
    groups = table.groups(measured)
    assert [group.subjects for group in groups] == [("a",), ("b",)]
    assert sum(len(line.cells) for group in groups for line in group.rows) == len(measured)
    assert groups[0].datasets == groups[1].datasets == ("x", "y", None)


def test_two_definitions_of_one_word_are_two_rows():
    (group,) = table.groups([row(), row(definition="other.fvu/1")])
    assert [line.definition for line in group.rows] == ["saehub.fvu/1", "other.fvu/1"]


def test_numbers_that_are_missing_say_why():
    measured = [
        row(value=None, status="failed", reason="NaN"),
        row("l0", value=None, status="not_measured", reason="no model"),
        row("dead", value=None, status="not_measured", reason="undecided at this budget"),
    ]
    (group,) = table.groups(measured)
    cells = [line.cells["in_sample"] for line in group.rows]
    assert [(cell.text, cell.remark) for cell in cells] == [
        ("failed", "NaN"),
        ("not measured", "no model"),
        ("undecided", "undecided at this budget"),
    ]


def test_an_interval_without_an_error_is_shown_and_a_caveat_stays_with_its_number():
    cell = table.cell(row(stderr=None, ci_low=0.4, ci_high=0.61, note="few rows"))
    assert cell.text == "0.5000 [0.4000, 0.6100]"
    assert cell.remark == "few rows"


def test_rows_of_results_json_and_of_a_newer_saehub_are_read():
    data = {**row().to_json(), "invented_later": 1}
    assert table.measurement(data) == row()
    assert table.measurement({"metric": "fvu"}).value is None


def test_headlines_take_the_first_that_has_a_value():
    names = ["explained_variance", "never_fired_share", "fvu", "ce_recovered_zero", "l0"]
    measured = [row(name) for name in names] + [row("dead_share", value=None, status="not_measured")]
    (group,) = table.groups(measured)
    ((_, lines),) = table.headlines([group])
    assert list(lines) == ["fvu", "ce_recovered_zero", "l0", "never_fired_share"]


def test_headlines_of_several_are_of_one_metric_where_all_have_it():
    other = [row(name, subjects=("b",)) for name in ("fvu", "dead_share@1e-04", "never_fired_share")]
    found = table.headlines(table.groups([row("fvu"), row("never_fired_share"), *other]))
    assert [list(lines) for _, lines in found] == [["fvu", "never_fired_share"]] * 2
    lone = table.headlines(table.groups([row("never_fired_share"), row("dead_share", subjects=("b",))]))
    assert [list(lines) for _, lines in lone] == [["never_fired_share"], ["dead_share"]]


def test_sizes_and_footnotes():
    (group,) = table.groups([row(n=256), row(dataset="out_of_sample", n=200)])
    assert table.sizes(group.rows[0]) == "256 | 200 sequences"
    notes: list[str] = []
    assert [table.footnote(note, notes) for note in ("x", None, "y", "x")] == [" [1]", "", " [2]", " [1]"]
