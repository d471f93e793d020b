"""The recipes that ship: they check clean against the real components, say what they should, and their comments do not lie."""

import re
import shlex

import pytest

from saehub.plugins import catalog
from saehub.recipe import builtin_dir, check, dump, check_text, expand_sweeps, to_plain
from saehub.sites import Site

pytestmark = pytest.mark.quick
RECIPES = sorted(builtin_dir().glob("*.yaml"), key=lambda path: path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_checks_clean_and_survives_its_normal_form(path):
    recipe, problems = check(path)
    assert problems == [], "\n".join(map(str, problems))
    assert recipe.name == path.stem and recipe.description
    again, problems = check_text(dump(to_plain(recipe)))
    assert problems == [] and again == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_override_in_its_comments_works(path):
    text = path.read_text(encoding="utf-8")
    options = [shlex.split(option)[0] for option in re.findall(r"--set ((?:'[^']*'|[^\s'])+)", text) if "=" in option]
    assert options
    for option in options:
        recipe, problems = check(path, [option])
        assert problems == [], "\n".join(map(str, problems))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_header_says_what_it_costs_and_how_to_launch_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines[: lines.index("")] if line.startswith("#"))
    for word in ("what", "needs", "cost", "launch", f"saehub recipe run {path.stem}", f"saehub recipe plan {path.stem}"):
        assert word in header
    knobs = [line for line in lines if re.match(r" +(- )?[a-z_]+: \S", line) and not re.match(r" +(- )?(id|uses|source|k|name|revision|family|n_layers|n_heads|d_\w+|vocab)\b", line)]
    assert sum("#" in line for line in knobs) >= len(knobs) / 2


def test_the_default_recipe():
    recipe, _ = check("topk-llama")
    assert recipe.model.name == "builtin/tiny-llama" and recipe.seed == 0
    assert {entry.source for entry in recipe.data.train.mix} == {"builtin/python-docs"}
    held_out = {name: {(entry.source, entry.split) for entry in data.mix} for name, data in recipe.data.eval.items()}
    assert held_out == {"in_sample": {("builtin/python-docs", "heldout")}, "out_of_sample": {("builtin/python-code", "heldout")}}
    (entry,) = recipe.train
    assert (entry.uses, entry.with_["k"], entry.with_["expansion"]) == ("native/topk", 32, 8)
    assert 1_000_000 <= recipe.data.train.tokens <= 1_800_000
    assert [catalog().find("evaluator", item.uses).address for item in recipe.evaluate] == ["native/core"]
    assert [catalog().find("exporter", item.uses).address for item in recipe.export] == ["saelens/saelens"]


def test_the_default_recipe_reads_the_middle_layer():
    import json

    from saehub.builtin import model_dir

    layers = json.loads((model_dir("builtin/tiny-llama") / "config.json").read_text())["num_hidden_layers"]
    recipe, _ = check("topk-llama")
    (site,) = map(Site.parse, recipe.extract.sites)
    assert (site.kind, site.layer) == ("resid_post", layers // 2 - 1)


def test_the_sweep_in_the_default_recipe_s_comment():
    path = builtin_dir() / "topk-llama.yaml"
    text = path.read_text(encoding="utf-8")
    (comment,) = re.findall(r"# (sweep: \{.*\})", text)
    recipe, problems = check_text(text.replace(f"# {comment}", comment), str(path))
    assert problems == []
    ids = [entry.id for entry in expand_sweeps(recipe).train]
    assert len(ids) == 6 and ids[0] == "native-k32-k16-seed0" and "train six: native-k32-k16-seed0" in text


def test_the_8b_recipe_replaces_what_it_extends():
    recipe, _ = check("topk-llama-3.1-8b")
    assert recipe.model.name == "meta-llama/Llama-3.1-8B-Instruct" and recipe.model.dtype == "bfloat16"
    assert (recipe.model.shape.n_layers, recipe.model.shape.d_model, recipe.model.shape.vocab) == (32, 4096, 128_256)
    assert recipe.extract.sites == ("resid_post.4", "resid_post.10", "resid_post.19", "resid_post.28")
    assert all(Site.parse(site).tap(recipe.model.shape) for site in recipe.extract.sites)
    assert [entry.id for entry in recipe.train] == ["native-k64"]
    trained = {(entry.source, entry.config) for entry in recipe.data.train.mix}
    assert len(trained) == 2 and not any(source.startswith("builtin/") for source, _ in trained)
    assert not trained & {(entry.source, entry.config) for entry in recipe.data.eval["out_of_sample"].mix}
    assert 100_000_000 <= recipe.data.train.tokens <= 1_000_000_000 and not recipe.data.train.repeat
    assert len(recipe.evaluate) == 1 and recipe.evaluate[0].with_ == {"loss_sequences": 64}
