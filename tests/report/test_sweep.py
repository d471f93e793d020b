"""Sweeps: curves read at matched L0, layers in order, and all of it on the page; verdicts on top of it."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from saehub.api import Measurement
from saehub.report import build, sweep

pytestmark = pytest.mark.quick
SVG = "{http://www.w3.org/2000/svg}"


def number(sae, metric, value, site="resid_post.2", dataset="in_sample", **more):
    known = {"evaluator": "native/core", "definition": f"saehub.{metric}/1", "dataset_hash": "h", "stderr": 0.001, "n": 100}
    return Measurement(metric, value, (sae,) if isinstance(sae, str) else sae, site=site, dataset=dataset, **{**known, **more})


def rows(points, site="resid_post.2"):
    """(SAE, L0, FVU) to measurements."""
    return [row for sae, l0, fvu in points for row in (number(sae, "l0", l0, site), number(sae, "fvu", fvu, site, better="lower"))]


SAES = {
    **{f"n{k}": {"trainer": "native/topk", "d_sae": 512} for k in (16, 64)},
    **{f"s{k}": {"trainer": "sparsify/topk", "d_sae": 512} for k in (8, 32, 128)},
}


def test_curves_are_read_at_the_l0_that_both_reach():
    measured = rows([("n16", 16, 0.20), ("n64", 64, 0.08), ("s8", 8, 0.35), ("s32", 32, 0.16), ("s128", 128, 0.05)])
    (one,) = sweep.tradeoffs(measured, SAES)
    native, sparsify = one.curves
    assert [curve.name for curve in one.curves] == ["native/topk, 512 latents", "sparsify/topk, 512 latents"]
    assert one.matched == [16, 32, 64]
    assert native.at(16) == (0.20, True) and native.at(16.1) == (0.20, True)
    value, measured_there = native.at(32)
    assert not measured_there and value == pytest.approx(np.interp(math.log(32), np.log([16, 64]), [0.20, 0.08]))
    assert sparsify.at(64)[0] == pytest.approx(np.interp(math.log(64), np.log([32, 128]), [0.16, 0.05]))
    assert native.at(8) is None and native.at(128) is None
    assert one.front() == ["s8", "n16", "s32", "n64", "s128"]


def test_a_point_that_another_beats_is_not_on_the_front():
    (one,) = sweep.tradeoffs(rows([("n16", 16, 0.20), ("n64", 64, 0.30)]), SAES)
    assert one.front() == ["n16"] and one.matched == []


def test_saes_of_one_l0_are_no_tradeoff():
    assert sweep.tradeoffs(rows([("n16", 32, 0.20), ("n64", 32.1, 0.30)]), SAES) == []


def test_sites_are_never_mixed():
    measured = rows([("n16", 16, 0.2)], "resid_post.1") + rows([("n64", 64, 0.1)], "resid_post.3")
    assert sweep.tradeoffs(measured, SAES) == []
    (fvu, l0) = sweep.layers(measured)
    assert (fvu[0], fvu[2]) == ("fvu", [(1, 0.2, "n16"), (3, 0.1, "n64")]) and l0[0] == "l0"
    assert sweep.layers(rows([("n16", 16, 0.2), ("n64", 64, 0.2)])) == []


def words(page):
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    return tree, " ".join("".join(tree.itertext()).split())


@pytest.fixture
def sweep_run(fake_run, tmp_path):
    """Four SAEs in two layers with verdicts, redundancy, deadness curves and a compared pair."""
    saes = ("a-k16", "a-k64", "b-k32", "late")
    measured = []
    for i, sae in enumerate(saes):
        site = "resid_post.5" if sae == "late" else "resid_post.2"
        measured += rows([(sae, (16, 64, 32, 32)[i], (0.2, 0.08, 0.14, 0.3)[i])], site)
        measured += [
            number(sae, "redundancy", 0.3 + 0.1 * i, site, None),
            number(sae, "redundancy_null", 0.25, site, None),
            number(sae, "waking_share", 0.1, site, parts={"curve": {"rows": [1, 10, 100], "silent": [0.99, 0.7, 0.2], "bound": [3, 0.3, 0.03]}}),
            number(sae, "verdict", 1.0, site, None, stderr=None, evaluator="native/verdict", note="x", parts={
                "word": ("good", "deceptively good", "dead", "undecided")[i], "reasons": [f"reason {i}"], "flags": ["undercomplete"], "next": [f"look at {i}"],
            }),
            number(sae, "verdict_score", 0.1 * i, site, None, stderr=None, evaluator="native/verdict"),
        ]  # fmt: skip
    pair = {"evaluator": "native/stability", "dataset": None, "note": "optimal (certified gap 0), 0.1 s"}
    for metric, value in (("shared_share", 0.4), ("shared_share_random", 0.0), ("pw_mcc", 0.6), ("pw_mcc_random", 0.13), ("pw_mcc_init", 0.2)):
        parts = {"curve": {"x": [0.1, 0.5, 0.9], "y": [1.0, 0.6, 0.1], "x_label": "cosine", "title": "latents shared"}} if metric == "shared_share" else {}
        measured.append(number(("a-k16", "a-k64"), metric, value, parts=parts, **pair))
    run = fake_run.write(tmp_path / "sweep", saes, rows=measured)
    facts = fake_run.card(saes)
    for sae in saes:
        facts["saes"][sae]["trainer"] = "native/topk" if sae.startswith("a") else "sparsify/topk"
    fake_run.dump(run / "run_card.json", facts)
    return run


def test_the_page_of_a_sweep(sweep_run):
    page = build.write_report(sweep_run).read_text(encoding="utf-8")
    tree, said = words(page)
    sections = [heading.text for heading in tree.iter("h2")]
    assert sections[:2] == ["Verdicts", "At a glance"]
    assert [name for name in ("Sparsity against fidelity", "Layer by layer", "Deadness", "Redundancy", "Stability") if name not in sections] == []
    for text in ("reason 2", "Check next: look at 1", "undercomplete", "deceptively good", "healthiest of this run"):
        assert text in said
    (table,) = [table for table in tree.iter("table") if table.get("class") == "layers"]
    order = [" ".join("".join(row[0].itertext()).split()) for row in table.iter("tr")]
    assert order == ["SAE", "a-k16", "a-k64", "b-k32", "late"]
    labels = {picture.get("aria-label"): picture for picture in tree.iter(f"{SVG}svg")}
    assert len(list(labels["FVU against L0 at resid_post.2"].iter(f"{SVG}circle"))) == 3
    assert len(list(labels["redundancy and its null"].iter(f"{SVG}circle"))) == 8
    assert len(list(labels["latents that have not fired yet (in-sample)"].iter(f"{SVG}polyline"))) == 4
    assert "latents shared" in labels and "FVU by layer" in labels
    assert "L0 32" in said and "0.1400 *" in said  # a's curve between k=16 and k=64: halfway in log L0
    stability = next(table for table in tree.iter("table") if "these SAEs" in "".join(table.itertext()))
    lines = [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in stability.iter("tr")]
    assert lines[2][:5] == ["a-k16 + a-k64", "PW-MCC", "0.6000 ± 0.0010", "0.1300 ± 0.0010", "0.2000 ± 0.0010"]
    assert lines[1][4] == "not measured"


def test_it_stays_small_and_needs_nothing(sweep_run):
    page = build.write_report(sweep_run)
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 3_000_000
    tree, _ = words(text)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "form", "base"}
    assert "nan" not in "".join(value for element in tree.iter() for value in element.attrib.values() if element.tag.startswith(SVG)).lower()
