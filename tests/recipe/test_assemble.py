"""`extends` and `--set`: the rules of merging written out by hand, and problems that name the file or option they come from."""

import pytest

from saehub.recipe import check, check_text, to_plain

pytestmark = pytest.mark.quick

BASE = """\
saehub: 1
name: base
model: {name: builtin/tiny-llama, revision: abc, dtype: float32}
data:
  train:
    mix:
      - {source: builtin/python-docs, weight: 3}
      - {source: builtin/python-code, weight: 1}
    tokens: 1000
    context: 64
  eval:
    in_sample: {source: builtin/python-docs, tokens: 100}
    other: {source: builtin/python-code, split: heldout}
extract: {sites: [resid_post.1, resid_post.2], lm_batch: 8}
train:
  - {id: one, uses: native/topk, with: {k: 1, expansion: 4}}
  - {id: two, uses: native/topk, with: {k: 2, optimizer: {name: muon, lr: 0.1}}, seed: 5}
  - {id: three, uses: native/topk, with: {k: 3}}
evaluate:
  - {uses: native/core}
export:
  - {uses: saelens}
"""


@pytest.fixture
def family(tmp_path, catalog):
    """Write base.yaml and a recipe that extends it; check the latter."""

    def build(text, overrides=(), base=BASE):
        (tmp_path / "base.yaml").write_text(base)
        child = tmp_path / "child.yaml"
        child.write_text("saehub: 1\nname: child\nextends: base\n" + text)
        return check(child, overrides, catalog)

    return build


def test_everything_is_inherited(family, catalog, tmp_path):
    recipe, problems = family("")
    assert problems == []
    base, _ = check(tmp_path / "base.yaml", catalog=catalog)
    mine, theirs = to_plain(recipe), to_plain(base)
    assert mine.pop("name") == "child" and theirs.pop("name") == "base"
    assert mine == theirs


def test_maps_merge_and_other_lists_are_replaced(family):
    recipe, problems = family("data: {train: {tokens: 7}}\nextract: {sites: [resid_post.0]}\nmodel: {dtype: bfloat16}\n")
    assert problems == []
    assert (recipe.data.train.tokens, recipe.data.train.context, len(recipe.data.train.mix)) == (7, 64, 2)
    assert recipe.extract.sites == ("resid_post.0",) and recipe.extract.lm_batch == 8
    assert (recipe.model.dtype, recipe.model.revision) == ("bfloat16", "abc")


def test_entries_merge_by_id_in_place_and_new_ones_follow(family):
    recipe, problems = family("train:\n  - {id: new, uses: native/topk, with: {k: 9}}\n  - {id: two, with: {optimizer: {lr: 0.5}}}\n")
    assert problems == []
    assert [entry.id for entry in recipe.train] == ["one", "two", "three", "new"]
    assert recipe.train[1].with_ == {"k": 2, "optimizer": {"name": "muon", "lr": 0.5}} and recipe.train[1].seed == 5


def test_entries_without_id_merge_by_what_they_use(family):
    recipe, problems = family("evaluate:\n  - {uses: native/core, saes: [one]}\n")
    assert problems == [] and len(recipe.evaluate) == 1 and recipe.evaluate[0].saes == ("one",)


def test_entries_and_keys_are_dropped_by_remove(family):
    text = "train:\n  - {id: one, remove: true}\n  - {id: three, remove: true}\nexport:\n  - {uses: saelens, remove: true}\ndata: {eval: {other: {remove: true}}}\n"
    recipe, problems = family(text)
    assert problems == []
    assert [entry.id for entry in recipe.train] == ["two"] and recipe.export == () and list(recipe.data.eval) == ["in_sample"]


def test_the_whole_train_list_can_be_replaced(family):
    drop = "".join(f"  - {{id: {name}, remove: true}}\n" for name in ("one", "two", "three"))
    recipe, problems = family(f"train:\n{drop}  - {{id: mine, uses: native/topk, with: {{k: 5}}}}\n")
    assert problems == [] and [entry.id for entry in recipe.train] == ["mine"]


def test_what_belongs_to_a_choice_goes_with_it(family):
    recipe, problems = family("train: [{id: two, uses: rival/topk, with: {k: 7}}]\nmodel: {name: gpt2}\n")
    assert problems == []
    assert recipe.train[1].with_ == {"k": 7} and recipe.train[1].seed == 5
    assert (recipe.model.name, recipe.model.revision, recipe.model.dtype) == ("gpt2", None, "float32")


def test_a_flat_source_replaces_an_inherited_mix(family):
    recipe, problems = family("data:\n  train: {source: builtin/python-code}\n  eval:\n    in_sample: {source: builtin/python-code}\n")
    assert problems == []
    assert [entry.source for entry in recipe.data.train.mix] == ["builtin/python-code"]
    assert [(entry.source, entry.split) for entry in recipe.data.eval["in_sample"].mix] == [("builtin/python-code", "heldout")]
    assert recipe.data.eval["in_sample"].tokens == 100


def test_settings_of_an_inherited_single_source(family):
    recipe, problems = family("data: {eval: {in_sample: {split: all, weight: 2}}}\n")
    assert [problem.severity for problem in problems] == ["warning"]  # all of what is trained on
    assert recipe.data.eval["in_sample"].mix[0].source == "builtin/python-docs" and recipe.data.eval["in_sample"].mix[0].split == "all"
    recipe, problems = family("data: {train: {split: all}}\n")  # two sources: which one?
    assert recipe is None and "unknown key 'split'" in problems[0].message


def test_chains_and_relative_paths(tmp_path, catalog):
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "deep" / "middle.yaml").write_text("saehub: 1\nname: middle\nextends: ../base.yaml\nseed: 3\ndata: {train: {tokens: 5}}\n")
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("saehub: 1\nname: leaf\nextends: deep/middle\ndata: {train: {tokens: 6}}\n")
    recipe, problems = check(leaf, catalog=catalog)
    assert problems == [] and (recipe.seed, recipe.data.train.tokens, recipe.data.train.context) == (3, 6, 64)


def test_a_recipe_may_carry_the_name_of_the_built_in_one_that_it_extends(tmp_path, catalog):
    mine = tmp_path / "topk-llama.yaml"
    mine.write_text("saehub: 1\nname: mine\nextends: topk-llama\ntrain: [{id: native-k32, with: {k: 5}}]\nextract: {with: {}}\n")
    recipe, problems = check(mine, catalog=catalog)
    assert not any(problem.path == "extends" for problem in problems), [str(problem) for problem in problems]


@pytest.mark.parametrize(
    "text, file, line, words",
    [
        ("extends_: x\n", "child.yaml", 4, "unknown key 'extends_'"),
        ("train: [{id: tow, remove: true}]\n", "child.yaml", 4, "no entry 'tow'; did you mean 'two'?"),
        ("data: {eval: {othr: {remove: true}}}\n", "child.yaml", 4, "nothing to remove; did you mean 'other'?"),
        ("train: [{id: two, with: {k: no}}]\n", "child.yaml", 4, "should be a whole number, got 'no'"),
        ("train: [{id: five, uses: native/topk, with: {k: 1}}, {id: five, uses: native/topk, with: {k: 2}}]\n", "child.yaml", 4, "'five' stands here a second time"),
        ("train: [{id: four, with: {k: 1}}]\n", "child.yaml", 4, "missing key 'uses'"),
        ("extract: {sites: [resid_post.0]}\ntrain: [{id: two, site: resid_post.1}]\n", "child.yaml", 5, "not among extract.sites"),
    ],
)
def test_problems_name_the_file_that_they_stand_in(family, text, file, line, words):
    recipe, problems = family(text)
    assert recipe is None
    (problem,) = problems
    assert problem.file.endswith(file) and problem.line == line and words in problem.message


def test_problems_of_the_extended_file_name_that_file(family, tmp_path):
    recipe, problems = family("train: [{id: two, with: {k: -1}}]\n", base=BASE.replace("lm_batch: 8", "lm_bach: 8"))
    assert recipe is None and len(problems) == 2
    assert problems[0].file == str(tmp_path / "child.yaml") and "greater than 0, got -1" in problems[0].message
    assert problems[1].file == str(tmp_path / "base.yaml") and problems[1].line == 14 and "did you mean 'lm_batch'" in problems[1].message
    assert problems[1].source_line.startswith("extract:")


def test_a_base_that_cannot_be_read_is_the_only_thing_missing(family, tmp_path):
    recipe, problems = family("seeed: 3\n", base="a: [1\n")
    assert recipe is None and [problem.message.split(" ")[0] for problem in problems] == ["unknown", "this"]
    assert problems[1].file == str(tmp_path / "base.yaml")


@pytest.mark.parametrize("name, words", [("topk-lama", "did you mean 'topk-llama'"), ("[a, b]", "name or path of one recipe"), ("3", "name or path of one recipe"), ("./x/y.yaml", "no recipe or file")])
def test_a_base_that_does_not_exist(catalog, name, words):
    recipe, problems = check_text(f"saehub: 1\nname: x\nextends: {name}\n", "x.yaml", catalog=catalog)
    assert recipe is None and words in problems[0].message and (problems[0].line, problems[0].column) == (3, 10)


def test_circles_are_told_as_circles(tmp_path, catalog):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"saehub: 1\nname: {name}\nextends: {other}.yaml\n")
    recipe, problems = check(tmp_path / "a.yaml", catalog=catalog)
    circle = next(problem for problem in problems if "circle" in problem.message)
    assert circle.file.endswith("c.yaml") and [part.rpartition("/")[2] for part in circle.message.split(": ")[1].split(" -> ")] == ["a.yaml", "b.yaml", "c.yaml", "a.yaml"]
    (tmp_path / "self.yaml").write_text("saehub: 1\nname: self\nextends: ./self.yaml\n")
    recipe, problems = check(tmp_path / "self.yaml", catalog=catalog)
    assert recipe is None and "extends" == problems[0].path


def test_an_extending_recipe_has_a_name_of_its_own(family, tmp_path, catalog):
    family("")
    path = tmp_path / "nameless.yaml"
    path.write_text("saehub: 1\nextends: base\n")
    recipe, (problem,) = check(path, catalog=catalog)
    assert recipe is None and "missing key 'name'" in problem.message


# --- --set -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    "option, path, value",
    [
        ("seed=7", lambda r: r.seed, 7),
        ("train.two.with.k=64", lambda r: r.train[1].with_["k"], 64),
        ("train.1.with.k=64", lambda r: r.train[1].with_["k"], 64),
        ("train.two.with.optimizer.lr=1e-4", lambda r: r.train[1].with_["optimizer"], {"name": "muon", "lr": 1e-4}),
        ("train.one.with={k: 5}", lambda r: r.train[0].with_, {"k": 5}),
        ("train.one.seed=", lambda r: r.train[0].seed, None),
        ("train.two.remove=true", lambda r: [e.id for e in r.train], ["one", "three"]),
        ("train.one.sweep.k=[16, 32]", lambda r: r.train[0].sweep, {"k": (16, 32)}),
        ("extract.sites=[resid_post.0]", lambda r: r.extract.sites, ("resid_post.0",)),
        ("extract.sites.1=resid_post.3", lambda r: r.extract.sites, ("resid_post.1", "resid_post.3")),
        ("data.train.tokens=1_000", lambda r: r.data.train.tokens, 1000),
        ("data.train.source=builtin/python-docs", lambda r: [(m.source, m.weight) for m in r.data.train.mix], [("builtin/python-docs", 1.0)]),
        ("data.train.mix.0.weight=9", lambda r: r.data.train.mix[0].weight, 9),
        ("data.eval.in_sample.split=train", lambda r: r.data.eval["in_sample"].mix[0].split, "train"),
        ("data.eval.new={source: builtin/python-code}", lambda r: list(r.data.eval), ["in_sample", "other", "new"]),
        ("data.eval.new.source=builtin/python-code", lambda r: r.data.eval["new"].mix[0].split, "heldout"),
        ("data.eval.other.remove=true", lambda r: list(r.data.eval), ["in_sample"]),
        ("evaluate.native/core.saes=[one]", lambda r: r.evaluate[0].saes, ("one",)),
        ("name='2'", lambda r: r.name, "2"),
        ("description=a=b: c", None, None),
        ("description='a=b: c'", lambda r: r.description, "a=b: c"),
        (" train . one . with . k = 3", lambda r: r.train[0].with_["k"], 3),
    ],
)
def test_overrides(base, catalog, option, path, value):
    recipe, problems = check(base, [option], catalog)
    if path is None:
        assert recipe is None and problems[0].file == f"--set {option}" and problems[0].line == 0
        return
    assert recipe is not None, [str(problem) for problem in problems]
    assert path(recipe) == value


@pytest.mark.parametrize(
    "option, words",
    [
        ("train.tow.with.k=3", "train has no entry 'tow'; did you mean 'two'?"),
        ("train.9.with.k=3", "train has no entry '9'"),
        ("train.two.with.kk=3", "train.two.with: unknown key 'kk' of native/topk; did you mean 'k'?"),
        ("train.two.with.k=three", "train.two.with.k: should be a whole number, got 'three'"),
        ("train.two.with.k=[1", "'[' is not closed"),
        ("train.two.with.k.deep=3", "train.two.with.k is 2: there is no 'deep' in it"),
        ("seed", "should be PATH=VALUE"),
        ("=3", "should be PATH=VALUE"),
        ("a..b=3", "should be PATH=VALUE"),
        ("extends=topk-llama", "'extends' cannot be set from outside"),
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("train=3", "train: should be a list, got 3"),
        ("train.two.id=one", "train.1.id: the id 'one' stands here a second time"),
        ("saehub=2", "recipe format 2 is not known"),
        ("train.two.with.k=.nan", "not a finite number"),
        ("seed=\udcff", "seed: should be a whole number"),
    ],
)
def test_problems_of_overrides_name_the_option(base, catalog, option, words):
    recipe, problems = check(base, [option], catalog)
    assert recipe is None and len(problems) == 1, [str(problem) for problem in problems]
    printed = str(problems[0]).encode("utf-8").decode()
    assert printed.startswith("--set " + option.replace("\udcff", "\ufffd") + ": ") and words in printed


def test_overrides_as_a_mapping_keep_their_types(base, catalog):
    values = {"train.two.with.k": 64, "train.two.with.optimizer.lr": 1e-5, "name": "1e-4", "description": "line\none: [", "extract.sites": ["resid_post.0"], "train.one.seed": None, "data.train.repeat": True}
    recipe, problems = check(base, values, catalog)
    assert problems == [], [str(problem) for problem in problems]
    assert recipe.train[1].with_["k"] == 64 and recipe.train[1].with_["optimizer"]["lr"] == 1e-5
    assert (recipe.name, recipe.description, recipe.extract.sites, recipe.data.train.repeat) == ("1e-4", "line\none: [", ("resid_post.0",), True)


def test_later_options_win_and_files_keep_their_places(base, catalog):
    recipe, problems = check(base, ["seed=1", "seed=2"], catalog)
    assert problems == [] and recipe.seed == 2
    _, problems = check(base, ["seed=-1", "train.one.with.k=0", "extract.lm_batch=0"], catalog)
    assert [problem.file for problem in problems] == ["--set " + option for option in ("seed=-1", "train.one.with.k=0", "extract.lm_batch=0")]


def test_ids_with_dots_are_addressed_whole(base, catalog):
    base.write_text(BASE.replace("id: two", "id: lr0.001"))
    recipe, problems = check(base, ["train.lr0.001.with.k=5"], catalog)
    assert problems == [] and recipe.train[1].with_["k"] == 5
