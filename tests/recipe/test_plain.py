"""A recipe as plain data and back: equal recipes, whatever the texts in it look like."""

import json

import pytest
import yaml

from saehub.recipe import check_text, dump, load_text, to_plain
from saehub.recipe.plain import dump_inline
from saehub.recipe.tree import plain

pytestmark = pytest.mark.quick

TEXTS = ["no", "1e-4", "12:30", "010", "~", "", "null", "1_000", "<<", "a: b", "- x", "two\nlines", "two\nlines\n", " lead", "trail ", "#x", "'q'", '"q"', "\t", "é日", "0x1F", ".5", "true", "=", "!x", "&x", "*x", "%x", "@x", "a" * 300, "x\u2028y", "9" * 60, ".nan"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_survive_our_own_yaml(text):
    for value in ({"a": text}, {"a": [text, {"b": text}]}):
        assert plain(load_text(dump(value), "x").root) == value
        inline = dump_inline(value["a"])
        assert "\n" not in inline and plain(load_text(inline, "x").root) == value["a"]
    if text:
        assert plain(load_text(dump({text: 1}), "x").root) == {text: 1}


def test_plain_data_holds_every_field_and_reads_back_as_the_same_recipe(catalog, good):
    recipe, _ = check_text(good, catalog=catalog)
    data = to_plain(recipe)
    assert data["train"] == [{"id": "a", "uses": "native/topk", "with": {"k": 32}, "site": None, "target_site": None, "seed": None, "init_from": None, "sweep": None}]
    assert data["data"]["train"]["context"] == 128 and data["extract"]["with"] == {}
    json.dumps(data, allow_nan=False)
    for text in (dump(data), json.dumps(data), yaml.safe_dump(data)):
        again, problems = check_text(text, catalog=catalog)
        assert problems == [] and again == recipe and to_plain(again) == data


def test_null_sections_are_absent_sections(catalog, good):
    text = good.replace("train: {source: builtin/python-docs, tokens: 1000}", "train: null").replace("train:\n  - {id: a", "saes:\n  - {id: a")
    text = text.replace("uses: native/topk, with: {k: 32}", "load: .")
    recipe, problems = check_text(text, catalog=catalog)
    assert problems == [], [str(problem) for problem in problems]
    again, problems = check_text(dump(to_plain(recipe)), catalog=catalog)
    assert problems == [] and again == recipe
