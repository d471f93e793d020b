"""SAEBench's unlearning eval on a toy that is asked questions in; proof of its mechanics (the toy knows nothing), and of every refusal, out."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.format import save
from saehub.checkpoint.sae import SAE
from saehub.errors import StageFailed, UsageError
from saehub.pipeline.evaluation import open_context

spec = spec_from_file_location("saebench_toys", Path(__file__).with_name("saebench_toys.py"))
toys = module_from_spec(spec)
spec.loader.exec_module(toys)
SITE = "resid_pre.0"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The toy that is asked."""
    return toys.InstructedStage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def settings(stage, tmp_path_factory) -> dict:
    """Local texts and questions; thresholds that leave the latent of every word alone, and that do not."""
    found = toys.unlearning_files(stage, tmp_path_factory.mktemp("data"))
    return {**found, "retain_thresholds": (0.05, 1.0), "n_features_list": (8,), "multipliers": (1, 60), "seeds": (1, 2)}


def config_of(settings: dict, **changes):
    from saehub_saebench.config_unlearning import UnlearningConfig

    return UnlearningConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in {**settings, **changes}.items()})


def measured(stage, folder: Path, sae: SAE, config) -> dict:
    """metric -> row."""
    from saehub_saebench.unlearning import Unlearning

    path = save(sae, folder / "sae", site=SITE, overwrite=True)
    spec = {
        "subjects": [{"id": "sae", "path": str(path), "site": SITE, "target_site": None}], "model": asdict(stage.spec), "datasets": {},
        "extractor": {"address": "native/hf", "config": {}}, "seed": 0, "device": "cpu", "work_dir": str(folder / "work"), "lm_batch": 4,
    }  # fmt: skip
    return {row.metric: row for row in Unlearning(config).evaluate(open_context(spec, model=stage.model))}


def letters(stage, fires_on: str) -> SAE:
    """ReLU latents that fire on the words of one letter each, with decoder rows of norm 2, and one that fires on every word."""
    words, embedding_VD = stage.model.tokenizer.get_vocab(), stage.model.hf.get_input_embeddings().weight.detach()
    of = lambda letter: torch.tensor([number for word, number in words.items() if word.isalpha() and word.islower() and len(word) == 5 and word[0] == letter])  # noqa: E731
    rows_FD = torch.stack([torch.nn.functional.normalize(embedding_VD[of(letter)].mean(0), dim=0) for letter in fires_on])
    every_D = torch.nn.functional.normalize(sum(embedding_VD[of(letter)].mean(0) for letter in LETTERS), dim=0)
    W_FD = torch.cat([rows_FD, every_D[None]])
    b_F = torch.tensor([-20.0] * len(fires_on) + [-2.0])
    return SAE.build(SAEConfig("relu", 32, len(W_FD)), {"W_enc": W_FD.T.contiguous(), "b_enc": b_F, "W_dec": 2 * W_FD, "b_dec": torch.zeros(32)})


def answers(stage, sae: SAE, clamped: list[int], multiplier: float, file: Path, name: str) -> float:
    """Share of a file's questions answered as before with x' = x - Σ_{i clamped, f_i > 0} (m + f_i) W_i / |W_i|, all rows but the first; f_i in units of |W_i|."""
    words, model = stage.model.tokenizer, stage.model.hf
    norm_F = sae.W_dec.norm(dim=1)
    right = []
    for row in map(json.loads, file.read_text().splitlines()):
        ids_T = torch.tensor(words.encode(toys.prompt(name, row), add_special_tokens=False))
        x_TD = model.get_input_embeddings()(ids_T).detach()
        f_TF = (x_TD @ sae.tensors()["W_enc"] + sae.tensors()["b_enc"]).relu() * norm_F
        change_TF = torch.where(f_TF > 0, -multiplier - f_TF, torch.zeros(()))[:, clamped]
        change_TF[0] = 0
        x_TD = x_TD + change_TF @ (sae.W_dec / norm_F[:, None])[clamped]
        with torch.no_grad():
            logits_V = model(inputs_embeds=x_TD[None]).logits[0, -1]
        right.append(int(logits_V[torch.tensor(words.convert_tokens_to_ids(list("ABCD")))].argmax()) == row["answer"])
    return sum(right) / len(right)


def test_the_score_is_that_of_clamping_by_hand(stage, settings, tmp_path):
    """Latents of the letters that only the text to forget has, clamped in the embedding; the best setting of those that keep the other answers."""
    from saehub_saebench.rows import OUTPUT
    from saehub_saebench.saebench_json import validated

    sae = letters(stage, LETTERS)
    files = {name: Path(path) for name, path in settings["questions"].items()}
    forget = [LETTERS.index(letter) for letter in "efgh"]
    sweep = {}
    for threshold, latents in ((0.05, forget), (1.0, [*forget, 26])):  # the latent of every word fires on more than 5 % of the text to retain
        for multiplier in settings["multipliers"]:
            sweep[threshold, multiplier] = {name: answers(stage, sae, latents, multiplier, file, name) for name, file in files.items()}
    kept = [found for found in sweep.values() if found[toys.SUBJECT] >= 0.99]
    best = 1 - min(found["wmdp-bio"] for found in kept)
    rows = measured(stage, tmp_path, sae, config_of(settings))
    assert best > 0 and 0 < len(kept) < 4, f"the toy shows nothing: {sweep}"
    assert rows["unlearning_score"].value == pytest.approx(best) and rows["unlearning_score"].n == 2
    assert rows["unlearning_settings_kept"].value == pytest.approx(len(kept) / 4)
    assert "norm 1" in rows["unlearning_score"].note and "Gemma" not in rows["unlearning_score"].note  # its template is Gemma's
    assert rows["unlearning_score"].dataset == "wmdp-bio" and rows["unlearning_score"].dataset_hash
    assert json.loads(validated("unlearning", rows["unlearning_score"].parts[OUTPUT]))["eval_result_metrics"]["unlearning"]["unlearning_score"] == pytest.approx(best)

    other = measured(stage, tmp_path, letters(stage, "mnop"), config_of(settings, seeds=(1,)))  # the same name, folders and settings
    assert other["unlearning_score"].value == 0


def test_the_hub_s_layout_gives_the_same_numbers(stage, settings, tmp_path):
    """cais/wmdp, cais/mmlu and wikitext below `data_dir`, and the corpus under the name that its authors give it."""
    sae, data = letters(stage, LETTERS), Path(settings["forget"]).parent
    own = measured(stage, tmp_path, sae, config_of(settings, seeds=(3,)))
    fetched = config_of(settings, seeds=(3,), forget=None, retain=None, questions={}, data_dir=str(data / "hub"))
    assert [*map(Path, fetched.files())][1:] == [data / "question_ids", *(data / "hub" / repo for repo in ("cais/wmdp", "cais/mmlu", "wikitext"))]
    assert fetched.warnings() == []
    there = measured(stage, tmp_path, sae, fetched)
    assert {name: row.value for name, row in there.items()} == {name: row.value for name, row in own.items()}


def test_a_model_that_knows_nothing_is_said_to_know_nothing(stage, settings, tmp_path):
    """Asked every question in all 24 orders of its choices, as SAEBench asks; SAEBench itself would divide by 0."""
    rows = measured(stage, tmp_path, letters(stage, "ef"), config_of(settings, seeds=(1,), question_ids=None))
    assert {row.status for row in rows.values()} == {"not_measured"}
    assert "no question of wmdp-bio, human_aging rightly in all 24 orders" in rows["unlearning_score"].reason


@pytest.mark.quick
def test_prompts_are_those_of_the_tokenizer_s_template(tmp_path):
    """Gemma's template gives SAEBench's own format; others are taken as they are, or refused with the reason."""
    from saehub.testing.toys import byte_tokenizer
    from saehub_saebench.unlearning import prompt_format

    words = byte_tokenizer()
    with pytest.raises(StageFailed, match="cannot ask toy its questions") as error:
        prompt_format(words, "toy")
    assert "no chat template" in error.value.why and "instruct" in error.value.fix
    words.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(StageFailed) as error:
        prompt_format(words, "toy")
    assert "one BOS in each prompt" in error.value.why
    words.chat_template = "{{ bos_token }}[{{ messages[0]['content'] }}]"
    with pytest.raises(StageFailed) as error:
        prompt_format(words, "toy")
    assert "' A', ' B', ' C', ' D' has several" in error.value.why


def test_gemma_s_template_is_saebench_s_format_and_another_is_noted(stage):
    from sae_bench.evals.unlearning.utils.var import GEMMA_INST_FORMAT
    from saehub_saebench.unlearning import prompt_format

    words = stage.model.tokenizer
    assert prompt_format(words, "toy") == GEMMA_INST_FORMAT
    before = words.chat_template
    words.chat_template = "{{ bos_token }}{ {{ messages[0]['content'] }} }"
    try:
        assert prompt_format(words, "toy").format(prompt="why {?}") == "<bos>{ why {?} }"
    finally:
        words.chat_template = before


def test_what_is_missing_or_malformed_is_said_before_work(stage, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sae = letters(stage, "ef")
    nothing = config_of(settings, questions={}, retain=None, forget=None, data_dir=str(tmp_path))
    with pytest.raises(StageFailed, match="needs cais/wmdp, cais/mmlu, wikitext") as error:
        measured(stage, tmp_path, sae, nothing)
    assert f"hf download Salesforce/wikitext --repo-type dataset --include README.md --include 'wikitext-2-raw-v1/*' --local-dir {tmp_path / 'wikitext'}" in error.value.fix
    assert nothing.warnings() == [] and [setting for setting, _, _ in nothing.lacking(None, None)] == ["forget", "data_dir"]
    with pytest.raises(StageFailed, match=r"data/bio-forget-corpus\.jsonl is not there") as error:
        measured(stage, tmp_path, sae, config_of(settings, forget=None))
    assert "huggingface.co/datasets/cais/wmdp-corpora" in error.value.fix
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n{"question": "b", "choices": ["1", "2"], "answer": 0}\n')
    for changes, told in (
        ({"questions": {"wmdp-bio": "odd.jsonl"}}, "odd.jsonl:1 is no question with four choices"),
        ({"retain": "odd.jsonl"}, "odd.jsonl:2 holds no text"),
        ({"questions": {"wmdp-bio": "none.jsonl"}}, "none.jsonl does not exist"),
        ({"question_ids": "none"}, "none is no folder"),
        ({"seq_len": 4096}, "the text to forget has fewer than 4096 tokens"),
    ):
        with pytest.raises((UsageError, StageFailed), match=told):
            measured(stage, tmp_path, sae, config_of(settings, **changes))


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, told",
    [
        ({"dataset_names": ("wmdp-bio", "college_biology")}, "something to keep"),
        ({"dataset_names": ("human_aging",)}, "wmdp-bio"),
        ({"questions": {"nutrition": "a.jsonl"}}, "questions names nutrition"),
        ({"retain_thresholds": (0.0,)}, "retain_thresholds"),
        ({"multipliers": (0,)}, "multipliers"),
    ],
)
def test_impossible_settings_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        config_of({}, **changes)
