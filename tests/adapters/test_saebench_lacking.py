"""What a machine lacks for SAEBench's evals is said by the plan: keys, templates, datasets, names; with commands that fetch no more than is read."""

from __future__ import annotations

import json
import shlex

import pytest

from saehub.errors import RecipeError
from saehub.pipeline.plan import make_plan
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.testing.toys import tiny_model, tiny_text

pytestmark = pytest.mark.quick
RECIPE = """
saehub: 1
name: lacking
model: {model}
data:
  train: {{source: {folder}/text.txt, tokens: 2_000, context: 32{template}}}
  eval: {{in_sample: {{source: {folder}/text.txt, split: heldout, tokens: 500}}}}
extract: {{sites: [resid_post.0], calibration: 256}}
train: [{{id: a, uses: native/topk, with: {{k: 4, width: 64, batch: 100}}}}]
evaluate: [{evaluate}]
"""
EVALS = "{uses: saebench/autointerp}, {uses: saebench/unlearning}, {uses: saebench/sparse_probing, with: {dataset_names: [fancyzhx/ag_news], data_dir: here}}"
ELSEWHERE = "{name: someone/gated, shape: {family: llama, n_layers: 2, d_model: 32, d_mlp: 64, n_heads: 4, d_head: 8, vocab: 512, context: 64}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lacking")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(200, words=60)))
    tiny_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No key, no hub, no cache."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def planned(folder, tmp_path, evaluate=EVALS, model=None, template="", contents=True):
    text = RECIPE.format(folder=folder, evaluate=evaluate, model=model or f"{{name: {folder}/model, device: cpu}}", template=template)
    recipe, problems = check_text(text, "lacking.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    return make_plan(recipe, catalog(), base=tmp_path / "home", contents=contents)


def test_the_plan_refuses_with_every_fix_at_once(folder, tmp_path):
    with pytest.raises(RecipeError) as error:
        planned(folder, tmp_path)
    told = {str(problem).splitlines()[0].partition(": ")[2]: problem for problem in error.value.problems}
    assert len(told) == 5
    for words, fix in (
        ("OPENAI_API_KEY is not set", "export OPENAI_API_KEY"),
        ("has no chat template", "an instruct model"),
        ("bio-forget-corpus.jsonl is not there", "wmdp-corpora"),
        ("cais/wmdp, cais/mmlu, wikitext are not on this machine", "hf download cais/wmdp"),
        ("fancyzhx/ag_news is not on this machine", "hf download fancyzhx/ag_news --repo-type dataset --local-dir here/fancyzhx/ag_news"),
    ):
        assert any(words in text and fix in problem.fix for text, problem in told.items()), words


def test_where_the_model_is_not_here_either_the_plan_warns(folder, tmp_path):
    plan = planned(folder, tmp_path, model=ELSEWHERE)
    assert any("OPENAI_API_KEY is not set; where it runs: export" in text for text in plan.warnings)
    assert any("fancyzhx/ag_news is not on this machine" in text for text in plan.warnings) and not any("chat template" in text for text in plan.warnings)


def test_what_is_there_is_not_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    planned(folder, tmp_path, "{uses: saebench/autointerp}")
    (tmp_path / "data" / "fancyzhx" / "ag_news").mkdir(parents=True)
    (tmp_path / "data" / "fancyzhx" / "ag_news" / "train.jsonl").write_text("{}")
    planned(folder, tmp_path, f"{{uses: saebench/sparse_probing, with: {{dataset_names: [fancyzhx/ag_news], data_dir: {tmp_path}/data}}}}")
    planned(folder, tmp_path, contents=False)  # a check of the recipe alone asks nothing of the machine


def test_the_commands_fetch_what_is_read_and_no_whole_archive(folder, tmp_path, monkeypatch):
    from saehub_saebench.hubdata import PARTS, fetch_command

    words = shlex.split(fetch_command("codeparrot/github-code", "my data"))
    assert words[-2:] == ["--local-dir", "my data/codeparrot/github-code"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--include"] == list(PARTS["codeparrot/github-code"])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    from saehub_saebench.config import RavelConfig
    from saehub_saebench.config_unlearning import UnlearningConfig

    (told,) = UnlearningConfig(dataset_names=("wmdp-bio", "human_aging"), forget=str(folder / "text.txt")).warnings()
    assert "--include 'human_aging/*'" in told and "--include 'wmdp-bio/*'" in told and "will fetch" in told
    assert "--include 'ravel_city_*.json' --local-dir" in RavelConfig(entity_attribute_selection={"city": ("Country", "Language")}).warnings()[0]


def test_part_of_a_dataset_is_enough_for_the_loader(tmp_path, monkeypatch):
    """A README that lists subjects whose files were left on the hub."""
    import datasets

    (tmp_path / "cais/mmlu/a").mkdir(parents=True)
    parts = "".join(f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*\n" for name in "ab")
    (tmp_path / "cais/mmlu/README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    (tmp_path / "cais/mmlu/a/test-0.jsonl").write_text('{"q": "x"}\n')
    monkeypatch.chdir(tmp_path)
    assert datasets.load_dataset("cais/mmlu", "a", split="test", cache_dir=str(tmp_path / "cache"))[0] == {"q": "x"}


@pytest.mark.parametrize(
    ("evaluator", "name", "near"),
    [
        ("sae_probes", "117_us_state_FLA", "did you mean '117_us_state_FL'"),
        ("sparse_probing", "fancyzhx/agnews", "did you mean 'fancyzhx/ag_news'"),
        ("tpp", "fancyzhx/ag_news", "it knows LabHC/bias_in_bios_class_set1"),
    ],
)
def test_a_name_that_no_dataset_has_is_a_fault_of_the_recipe(folder, evaluator, name, near):
    evaluate = f"{{uses: saebench/{evaluator}, with: {{dataset_names: [{name}]}}}}"
    recipe, problems = check_text(RECIPE.format(folder=folder, evaluate=evaluate, model=f"{{name: {folder}/model}}", template=""), "names.yaml")
    assert recipe is None and any(near in str(problem) for problem in problems)


def test_a_chat_template_is_known_from_the_files(folder, tmp_path):
    from saehub.api import ModelSpec
    from saehub.data.model import has_chat_template

    with pytest.raises(RecipeError, match="data.train.template") as error:
        planned(folder, tmp_path, "{uses: native/core}", template=", template: chat")
    assert "has no chat template" in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    spec = ModelSpec(str(tmp_path))
    assert has_chat_template(spec) is None  # nothing is known of its tokenizer
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_chat_template(spec) is True
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert has_chat_template(spec) is False
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(spec) is True
