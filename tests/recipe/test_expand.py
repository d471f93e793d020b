"""Sweeps: members counted and named by hand."""

import itertools

import pytest

from saehub.recipe import check_text, dump, expand_sweeps, to_plain

pytestmark = pytest.mark.quick


def recipe_of(catalog, good, entries, tail="  - {uses: native/core}\n"):
    start = good.index("train:\n  - ")
    text = good[:start].replace("[resid_post.2]", "[resid_post.2, resid_post.4]") + "train:\n" + entries + "evaluate:\n" + tail
    recipe, problems = check_text(text, catalog=catalog)
    assert problems == [], [str(problem) for problem in problems]
    return recipe


def test_every_combination_once_with_its_name(catalog, good):
    recipe = recipe_of(catalog, good, "  - {id: t, uses: native/topk, with: {k: 1, expansion: 2}, sweep: {k: [16, 32], expansion: [4, 0.5], seed: [0, 1]}}\n")
    expanded = expand_sweeps(recipe).train
    assert [entry.id for entry in expanded] == [f"t-k{k}-expansion{e}-seed{s}" for k, e, s in itertools.product((16, 32), (4, 0.5), (0, 1))]
    assert [(entry.with_["k"], entry.with_["expansion"], entry.seed) for entry in expanded] == list(itertools.product((16, 32), (4, 0.5), (0, 1)))
    assert all(entry.sweep is None for entry in expanded)
    assert recipe.train[0].sweep == {"k": (16, 32), "expansion": (4, 0.5), "seed": (0, 1)}


def test_sites_names_and_structures(catalog, good):
    entries = "  - {id: t, uses: native/topk, with: {k: 1}, sweep: {site: [resid_post.2, resid_post.4], verbose: [true, false], betas: [[0.9, 0.99], [0, 0]]}}\n"
    ids = [entry.id for entry in expand_sweeps(recipe_of(catalog, good, entries)).train]
    assert ids[0] == "t-resid_post.2-verbosetrue-betas0" and ids[-1] == "t-resid_post.4-verbosefalse-betas1" and len(set(ids)) == 8


def test_filters_that_name_a_sweep_name_its_members(catalog, good):
    entries = "  - {id: t, uses: native/topk, with: {}, sweep: {k: [1, 2]}}\n  - {id: u, uses: native/topk, with: {k: 3}}\n"
    tail = "  - {uses: native/core, saes: [t, u]}\n  - {id: second, uses: native/core, saes: [t-k2, u@resid_post.4, t-k1@resid_post.2]}\n"
    expanded = expand_sweeps(recipe_of(catalog, good, entries, tail))
    assert expanded.evaluate[0].saes == ("t-k1", "t-k2", "u")
    assert expanded.evaluate[1].saes == ("t-k2", "u@resid_post.4", "t-k1@resid_post.2")


def test_an_expanded_recipe_is_a_recipe(catalog, good):
    expanded = expand_sweeps(recipe_of(catalog, good, "  - {id: t, uses: native/topk, with: {k: 1}, sweep: {share: [0.25, 1e-3], seed: [1]}}\n"))
    again, problems = check_text(dump(to_plain(expanded)), catalog=catalog)
    assert problems == [] and again == expanded and expand_sweeps(expanded) == expanded
    assert [entry.id for entry in again.train] == ["t-share0.25-seed1", "t-share0.001-seed1"]


def test_each_member_is_checked_and_blamed_at_its_value(catalog, good):
    text = good.replace("with: {k: 32}", "with: {k: 32}, sweep: {k: [1, 0, 13], seed: [0, 1]}")
    recipe, problems = check_text(text, catalog=catalog)
    line = text.splitlines()[9]
    assert recipe is None and [(problem.line, problem.column) for problem in problems] == [(10, line.index("0, 13") + 1), (10, line.index("13]") + 1)]
    assert "greater than 0" in problems[0].message and "bad luck" in problems[1].message
