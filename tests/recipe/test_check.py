"""Problems of a recipe: exact words, and places counted in the text itself; all of them at once."""

import textwrap

import pytest

from saehub.errors import RecipeError, UsageError
from saehub.recipe import check, check_text, make_config, resolve

pytestmark = pytest.mark.quick

MANY = """\
saehub: 1
name: my recipe
model: {nmae: builtin/tiny-llama, dtype: float16x, device: gpu}
data:
  train: {source: builtin/python-doc, tokens: "1000", contxt: 64}
  eval:
    out_of_sample: {source: builtin/python-docs, split: heldot, tokens: -3}
extract:
  sites: [resid_pots.2, blocks.2.hook_resid_post]
  normalize: sqrt
  store_limit: 2 GX
train:
  - id: a
    uses: native/tpok
    with: {k: 32}
  - id: a
    uses: native/topk
    with: {expantion: 16, k: "32", optimizer: {name: adamw, lr: 0}}
    init_from: nowhere
  - {id: ambiguous, uses: topk, with: {k: 1}}
  - id: swept
    uses: native/topk
    with: {k:16}
    sweep: {k: [16, many], sede: [1]}
evaluate:
  - uses: native/core
    saes: [b]
    with: {anything: 1}
sed: 3
"""

# (needle, occurrence, first line after the place, hint or None), in the order in which they must come
EXPECTED = [
    ("my recipe", 1, "name: 'my recipe' cannot be the name of a folder", "at most 100 letters, digits and . _ + -, beginning with a letter or digit"),
    ("{nmae", 1, "model: missing key 'name'", None),
    ("nmae", 1, "model: unknown key 'nmae'; did you mean 'name'?", None),
    ("float16x", 1, "model.dtype: should be float32, bfloat16 or float16, got 'float16x'; did you mean 'float16'?", None),
    ("gpu", 1, "model.device: 'gpu' is not a device; did you mean 'cuda'?", "one of auto, cpu, cuda, mps, xpu, with an index such as cuda:1"),
    ("builtin/python-doc,", 1, "data.train.mix.0.source: source 'builtin/python-doc' does not exist; did you mean 'builtin/python-docs'?", "embedded sources: builtin/python-docs, builtin/python-code"),
    ('"1000"', 1, "data.train.tokens: should be a whole number, got '1000'", "without the quotes: 1000"),
    ("contxt", 1, "data.train: unknown key 'contxt'; did you mean 'context'?", None),
    ("heldot", 1, "data.eval.out_of_sample.mix.0.split: split 'heldot' of 'builtin/python-docs' does not exist; did you mean 'heldout'?", "use train, heldout or all"),
    ("-3", 1, "data.eval.out_of_sample.tokens: should be greater than 0, got -3", None),
    ("resid_pots", 1, "extract.sites.0: 'resid_pots.2' is not a site; did you mean 'resid_post'?", ...),
    ("blocks.2", 1, "extract.sites.1: 'blocks.2.hook_resid_post' is TransformerLens' name of a tensor, not a site", "write 'resid_post.2'"),
    ("sqrt", 1, "extract.normalize: should be none, sqrt_d or unit, got 'sqrt'; did you mean 'sqrt_d'?", None),
    ("2 GX", 1, "extract.store_limit: '2 GX' is not a size", "a number of bytes, or such as 500 MB, 2 GB, 1.5 TB, 2 GiB"),
    ("native/tpok", 1, "train.0.uses: no trainer is called 'native/tpok'; did you mean 'native/topk'?", ...),
    ("a\n    uses: native/topk", 1, "train.1.id: the id 'a' stands here a second time", "the first is in many.yaml, line 13"),
    ("expantion", 1, "train.1.with: unknown key 'expantion' of native/topk; did you mean 'expansion'?", None),
    ('"32"', 1, "train.1.with.k: should be a whole number, got '32'", "without the quotes: 32"),
    ("adamw", 1, "train.1.with.optimizer.name: should be adam, signum or muon, got 'adamw'; did you mean 'adam'?", None),
    ("0}", 1, "train.1.with.optimizer.lr: should be greater than 0, got 0", None),
    ("nowhere", 1, "train.1.init_from: there is no checkpoint 'nowhere'", ...),
    ("topk, with: {k: 1}", 1, "train.ambiguous.uses: trainer 'topk' is provided by 2 plugins", "write one of: native/topk, rival/topk"),
    ("k:16", 1, "train.swept.with: unknown key 'k:16' of native/topk", "put a space after the colon: k: 16"),
    ("many]", 1, "train.swept.sweep.k.1: should be a whole number, got 'many'", None),
    ("sede", 1, "train.swept.sweep.sede: 'sede' cannot be swept: native/topk has no such setting; did you mean 'seed'?", ...),
    ("b]", 1, "evaluate.native/core.saes.0: no SAE has the id 'b'", ...),
    ("anything", 1, "evaluate.native/core.with: unknown key 'anything' of native/core", "known keys: loss_sequences"),
    ("sed: 3", 1, "unknown key 'sed'; did you mean 'seed'?", None),
]  # fmt: skip


def place(text, needle, occurrence=1):
    at = -1
    for _ in range(occurrence):
        at = text.index(needle, at + 1)
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def test_many_problems_at_once_in_these_words_at_these_places(catalog):
    recipe, problems = check_text(MANY, "many.yaml", catalog=catalog)
    assert recipe is None
    lines = MANY.splitlines()
    for problem, (needle, occurrence, words, hint) in zip(problems, EXPECTED, strict=True):
        line, column = place(MANY, needle, occurrence)
        printed = str(problem).splitlines()
        assert printed[0] == f"many.yaml:{line}:{column}: {words}"
        assert printed[1] == f"{line:5} | {lines[line - 1]}"
        assert printed[2] == f"      | {' ' * (column - 1)}^"
        assert lines[line - 1][printed[2].index("^") - 8 :].startswith(needle.splitlines()[0])
        if hint is None:
            assert len(printed) == 3, printed
        elif hint is not ...:
            assert printed[3:] == [f"      = {hint}"]


def test_a_good_recipe(catalog, good):
    recipe, problems = check_text(good, catalog=catalog)
    assert problems == []
    assert recipe.data.train.mix[0].source == "builtin/python-docs" and recipe.data.train.mix[0].split == "train"
    assert recipe.data.eval["in_sample"].mix[0].split == "heldout"
    assert recipe.train[0].with_ == {"k": 32} and recipe.extract.uses == "native/hf" and recipe.seed == 0


def only(text, catalog, **keys):
    """The one error of a recipe."""
    recipe, problems = check_text(text, "x.yaml", catalog=catalog, **keys)
    errors = [problem for problem in problems if problem.severity == "error"]
    assert recipe is None and len(errors) == 1, [str(problem) for problem in problems]
    return errors[0]


@pytest.mark.parametrize(
    "with_, key, words",
    [
        ("{k: 0}", "0", "train.a.with.k: should be greater than 0, got 0"),
        ("{k: -5}", "-5", "train.a.with.k: should be greater than 0, got -5"),
        ("{k: 2.5}", "2.5", "train.a.with.k: should be a whole number, got 2.5"),
        ("{k: true}", "true", "train.a.with.k: should be a whole number, got true"),
        ("{k: [1]}", "[1]", "train.a.with.k: should be a whole number, got a list"),
        ("{k: }", " }", "train.a.with.k: should be a whole number, got nothing"),
        ("{}", "{}", "train.a.with: missing key 'k'"),
        ("{k: 1, share: 1.5}", "1.5", "train.a.with.share: should be at most 1, got 1.5"),
        ("{k: 1, expansion: big}", "big", "train.a.with.expansion: should be a number, got 'big'"),
        ("{k: 1, verbose: no}", "no", "train.a.with.verbose: should be true or false, got 'no'"),
        ("{k: 1, betas: 0.9}", "0.9", "train.a.with.betas: should be a list, got 0.9"),
        ("{k: 1, betas: [0.9]}", "[0.9", "train.a.with.betas: should have at least 2 items, got 1"),
        ("{k: 1, betas: [1, 2, 3]}", "[1", "train.a.with.betas: should have at most 2 items, got 3"),
        ("{k: 1, names: [a, 2.5]}", "2.5", "train.a.with.names.1: should be text or a whole number, got 2.5"),
        ("{k: 1, optimizer: adam}", "adam", "train.a.with.optimizer: should be a map (key: value), got 'adam'"),
        ("{k: 1, optimizer: {lr: -1e-4}}", "-1e-4", "train.a.with.optimizer.lr: should be greater than 0, got -0.0001"),
        ("{k: 13}", "13", "train.a.with.k: 13 brings bad luck"),
        ("{k: 14}", "14", "train.a.with.k: k is 14, and that does not work either"),
        ("{k: 15}", "{k", "train.a.with: these settings do not go together"),
        ("{k: 16, verbose: true}", "{k", "train.a.with: native/topk does not accept this: RuntimeError: the plugin's own bug"),
        ("", "\n", "train.a.with: should be a map (key: value), got nothing"),
    ],
)  # fmt: skip
def test_settings_against_the_component_s_dataclass(catalog, good, with_, key, words):
    text = good.replace("{id: a, uses: native/topk, with: {k: 32}}", f"id: a\n    uses: native/topk\n    with: {with_}")
    problem = only(text, catalog)
    assert str(problem).splitlines()[0].split(": ", 1)[1] == words
    offset = text.index(f"with: {with_}") + len("with: ")
    start = offset + with_.index(key) if key != "\n" else offset - 1
    if key != "\n":
        assert (problem.line, problem.column) == (text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start))


def test_exponents_and_integers_where_numbers_are_meant(catalog, good):
    recipe, problems = check_text(good.replace("{k: 32}", "{k: 1e1, expansion: 8, optimizer: {lr: 1e-4}}").replace("1000", "1e3"), catalog=catalog)
    assert problems == []
    config = make_config(catalog.find("trainer", "native/topk"), recipe.train[0].with_)
    assert (config.k, config.expansion, config.optimizer.lr, recipe.data.train.tokens) == (10, 8.0, 1e-4, 1000)
    assert type(config.k) is int and type(config.expansion) is float


def test_make_config(catalog):
    topk = catalog.find("trainer", "native/topk")
    assert make_config(topk, {"k": 3}).k == 3
    assert make_config(catalog.find("exporter", "saelens"), {}) is None
    with pytest.raises(UsageError, match="unknown key 'kk' of native/topk; did you mean 'k'") as caught:
        make_config(topk, {"kk": 3, "k": "no"})
    assert "should be a whole number, got 'no'" in str(caught.value)
    with pytest.raises(UsageError, match="takes no settings"):
        make_config(catalog.find("exporter", "saelens"), {"x": 1})
    with pytest.raises(UsageError, match="missing key 'k'"):
        make_config(topk)


@pytest.mark.parametrize("version, words", [("2", "recipe format 2 is not known"), ("0", "recipe format 0"), ("one", "should be the version"), ("true", "should be the version"), ("'1'", "got '1'")])
def test_an_unknown_format_stops_at_that(catalog, version, words):
    problem = only(f"saehub: {version}\nsomething: else\n", catalog)
    assert words in problem.message and (problem.line, problem.column) == (1, 9)


def test_a_missing_format_version(catalog, good):
    assert only(good.replace("saehub: 1\n", ""), catalog).message == "missing key 'saehub'"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", "this file holds a list"),
        ("just words\n", "this file holds a single value"),
        ("a: [1\n", "is not closed"),
        ("<<<<<<< HEAD\n=======\n>>>>>>> x\n", "merge conflict"),
    ],
)
def test_files_that_are_no_recipe(catalog, text, words):
    assert words in only(text, catalog).message


def test_a_folder_a_missing_file_and_a_wrong_name(catalog, tmp_path):
    for what, words in ((tmp_path, "is a folder, not a recipe"), (tmp_path / "gone.yaml", "there is no recipe or file"), ("topk-lama", "did you mean 'topk-llama'"), ("a\0b", "no recipe")):
        recipe, (problem,) = check(what, catalog=catalog)
        assert recipe is None and words in problem.message
        with pytest.raises(RecipeError, match="1 problem in"):
            resolve(what, catalog=catalog)


def test_resolve_raises_all_problems_and_reports_the_rest(catalog, good, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MANY)
    with pytest.raises(RecipeError) as caught:
        resolve(path, catalog=catalog)
    assert len(caught.value.problems) == len(EXPECTED) and f"{len(EXPECTED)} problems in" in str(caught.value)
    assert caught.value.exit_code == 2 and "r.yaml:2:7: name: 'my recipe'" in str(caught.value)
    path.write_text(good.replace("in_sample", "out_of_sample"))
    seen = []
    assert resolve(path, catalog=catalog, on_problem=seen.append).name == "good"
    assert [problem.severity for problem in seen] == ["warning"]


def test_a_missing_library_is_told_with_its_command_and_does_not_hide_problems(catalog, good):
    text = good.replace("native/topk", "rival/relu")
    recipe, (problem,) = check_text(text, catalog=catalog)
    assert recipe is not None and problem.severity == "missing"
    assert problem.message == "rival/relu needs no_such_library, which is not installed" and problem.hint == "pip install 'rival-dist[rival]'"
    assert "missing: " in str(problem)
    _, problems = check_text(text.replace("k: 32", "kk: 32"), catalog=catalog)
    assert {problem.severity for problem in problems} == {"missing", "error"}


@pytest.mark.parametrize("name, words", [("broken/config", "could not be loaded|points at|cannot be loaded"), ("broken/types", "NoSuchType|does not accept")])
def test_a_plugin_s_broken_settings_are_a_problem_of_the_recipe(catalog, good, name, words):
    import re

    assert re.search(words, only(good.replace("native/topk", name), catalog).message)


def test_domains_of_evaluation(catalog, good):
    recipe, (problem,) = check_text(good.replace("in_sample:", "out_of_sample:"), "x.yaml", catalog=catalog)
    assert recipe is not None and problem.severity == "warning" and "also in data.train: this is not out of sample" in problem.message
    _, problems = check_text(good.replace("{source: builtin/python-docs}", "{source: builtin/python-docs, split: train}"), catalog=catalog)
    assert [(p.severity, p.path) for p in problems] == [("warning", "data.eval.in_sample.mix.0.source")]
    _, problems = check_text(good.replace("{source: builtin/python-docs}", "{source: builtin/python-code, split: train}"), catalog=catalog)
    assert problems == []


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("model: {name: builtin/tiny-llama}\n", "", "missing key 'model': native/hf runs a language model"),
        ("builtin/tiny-llama", "builtin/tiny-lama", "no embedded model is called 'builtin/tiny-lama'; did you mean 'builtin/tiny-llama'"),
        ("builtin/tiny-llama", "./gone", "there is no model './gone'"),
        ("builtin/tiny-llama", "two words", "there is no model 'two words'"),
        ("  train: {source: builtin/python-docs, tokens: 1000}\n", "", "training needs data.train"),
        ("source: builtin/python-docs, tokens", "tokens", "no text: native/hf needs a source"),
        ("source: builtin/python-docs, tokens", "mix: [], tokens", "no text: native/hf needs a source"),
        ("source: builtin/python-docs, tokens", "mix: [{source: builtin/python-docs}], source: builtin/python-code, tokens", "'source' beside 'mix'"),
        ("{source: builtin/python-docs, tokens: 1000}", "{source: gone.txt, tokens: 1000}", "no such file or folder"),
        ("  eval:\n    in_sample: {source: builtin/python-docs}\n", "", "native/core needs a dataset under data.eval"),
        ("extract: {sites: [resid_post.2]}\n", "", "no sites to train on"),
        ("[resid_post.2]", "[resid_post.2, resid_post.2]", "stands here a second time"),
        ("[resid_post.2]", "resid_post.2", "should be a list, got 'resid_post.2'"),
        ("uses: native/topk,", "uses: native/topk, site: resid_post.3,", "'resid_post.3' is not among extract.sites; did you mean 'resid_post.2'"),
        ("{uses: native/core}", "{uses: native/core}\nexport:\n  - {uses: saelens, with: {x: 1}}", "unknown key 'x': saelens/saelens takes no settings"),
        ("id: a,", "id: a b,", "cannot be the name of a folder"),
        ("id: a,", "id: 32,", "should be text, got 32"),
        ("id: a,", "", "missing key 'id'"),
        ("id: a,", "id: a, remove: true,", "'remove' has nothing to remove"),
        ("in_sample:", "in sample:", "cannot be the name of a dataset"),
        ("train:\n  - {id: a, uses: native/topk, with: {k: 32}}\n", "", "nothing to do"),
        ("train:\n  - {id: a, uses: native/topk, with: {k: 32}}\n", "saes: [{id: a, load: gone}]\n", "there is no checkpoint 'gone'"),
        ("{uses: native/core}", "{uses: native/core}\n  - {uses: native/core}", "evaluates twice"),
        ("{k: 32}}", "{k: 32}, sweep: {k: []}}", "a list with nothing in it"),
        ("{k: 32}}", "{k: 32}, sweep: {k: 3}}", "should be a list, got 3"),
        ("{k: 32}}", "{k: 32}, sweep: {k: [1, 1]}}", "the value 1 stands here a second time"),
        ("{k: 32}}", "{k: 32}, sweep: {seed: [-1]}}", "a seed is a whole number from 0 on"),
        ("{k: 32}}", "{k: 32}, sweep: {site: [resid_post.9]}}", "is not among extract.sites"),
        ("{k: 32}}", "{k: 32}, sweep: {uses: [a]}}", "'uses' cannot be swept"),
        ("{k: 32}}", f"{{k: 32}}, sweep: {{k: {list(range(20, 40))}, seed: {list(range(20))}}}}}", "400 combinations, at most 256"),
        ("{k: 32}}", "{k: 32}, sweep: {k: [3]}}\n  - {id: a-k3, uses: native/topk, with: {k: 32}}", "a member of this entry is called 'a-k3'|like another entry"),
        ("tiny-llama}", "tiny-llama, shape: {family: llama, n_layers: 0, d_model: 1, d_mlp: 1, n_heads: 1, d_head: 1, vocab: 1, context: 1}}", "should be greater than 0, got 0"),
        ("tiny-llama}", "tiny-llama, shape: {family: lama, n_layers: 1, d_model: 1, d_mlp: 1, n_heads: 1, d_head: 1, vocab: 1, context: 1}}", "the family 'lama' is not known; did you mean 'llama'"),
        ("tiny-llama}", "tiny-llama, shape: {family: llama, n_layer: 1, d_model: 1, d_mlp: 1, n_heads: 1, d_head: 1, vocab: 1, context: 1}}", "did you mean 'n_layers'|missing key 'n_layers'"),
        ("tokens: 1000}", "tokens: 1000, context: 1}", "should be at least 2, got 1"),
        ("tokens: 1000}", "tokens: 1000, weight: 0}", "should be greater than 0, got 0"),
        ("tokens: 1000}", "tokens: 1000, exclude: bos}", "should be a list, got 'bos'"),
        ("train:\n  - {id: a", "train:\n  -\n  - {id: a", "should be a map (key: value), got nothing"),
        ("train:\n", "train:\n  x: 1\ntrain_:\n", "should be a list, got a map"),
    ],
)  # fmt: skip
def test_one_thing_wrong(catalog, good, old, new, words):
    import re

    assert old in good
    recipe, problems = check_text(good.replace(old, new, 1), "x.yaml", catalog=catalog)
    assert recipe is None
    pattern = words if "|" in words else re.escape(words)
    assert any(re.search(pattern, f"{problem.message}") for problem in problems), [str(problem) for problem in problems]
    assert len(problems) <= 2 or "train_" in new or "n_layer:" in new, [str(problem) for problem in problems]


def test_sites_come_back_in_canonical_form_and_sizes_in_bytes(catalog, good):
    recipe, problems = check_text(good.replace("{sites: [resid_post.2]}", "{sites: [' resid_post.02 '], store_limit: 1.5 GiB}"), catalog=catalog)
    assert problems == [] and recipe.extract.sites == ("resid_post.2",) and recipe.extract.store_limit == 3 * 2**29


def test_an_extractor_of_files_has_sites_of_its_own_and_needs_no_model(catalog, good):
    text = good.replace("{sites: [resid_post.2]}", "{uses: native/files, sites: [layer two]}").replace("model: {name: builtin/tiny-llama}\n", "")
    text = text.replace("source: builtin/python-docs, tokens", "tokens").replace("evaluate:\n  - {uses: native/core}\n", "")
    recipe, problems = check_text(text, catalog=catalog)
    assert problems == [] and recipe.model is None and recipe.data.train.mix == ()


def test_long_lines_and_wide_characters_keep_the_caret_in_place(catalog, good):
    long = "x" * 300
    problem = only(good.replace("name: good\n", f"name: good\ndescription: [{long}, 日本]\n"), catalog)
    assert str(problem).splitlines()[1].endswith("...")
    problem = only(good.replace("{name: builtin/tiny-llama}", "{revision: 日本語, nmae: 1, name: gpt2}"), catalog)
    shown, caret = str(problem).splitlines()[1:3]
    assert caret.index("^") - shown.index("nmae") == 3  # three characters of two columns each


def test_problems_as_json(catalog):
    import json

    _, problems = check_text(MANY, "many.yaml", catalog=catalog)
    first = json.loads(json.dumps([problem.to_json() for problem in problems]))[0]
    assert first == {"file": "many.yaml", "line": 2, "column": 7, "path": "name", "message": "'my recipe' cannot be the name of a folder",
                     "hint": EXPECTED[0][3], "source_line": "name: my recipe", "severity": "error"}  # fmt: skip


def test_checking_imports_no_torch():
    import subprocess
    import sys

    code = textwrap.dedent("""
        import sys
        import saehub.recipe
        assert "pydantic" not in sys.modules and "torch" not in sys.modules
        saehub.recipe.check("topk-llama")
        saehub.recipe.json_schema()
        assert "torch" not in sys.modules, "torch"
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.quick
def test_a_value_that_yaml_cannot_say_is_named():
    import numpy as np

    with pytest.raises(UsageError, match="train.native-k32.with.k cannot be set to .*int64"):
        check("topk-llama", {"train.native-k32.with.k": np.int64(64)})
