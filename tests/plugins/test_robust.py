"""`native/paraphrase` and `native/drift` against the model driven by a plain hook, planted answers and scipy."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saehub.errors import FormatError, UsageError
from saehub.testing.conformance import resolve
from saehub.testing.evaluators import SITE, Bench
from saehub.testing.stage import Stage
from saehub_native.evaluate.robust.config import PERTURBATIONS, DriftConfig, ParaphraseConfig
from saehub_native.evaluate.robust.drift import DriftEvaluator
from saehub_native.evaluate.robust.paraphrase import ParaphraseEvaluator
from saehub_native.evaluate.robust.perturb import perturb, read_pairs


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("robust")
    return Bench(resolve("evaluator", "native/drift", None), folder, None, Stage(folder))


def table(rows):
    return {(row.subjects[0], row.dataset, row.metric): row for row in rows}


def active(bench: Bench, sae, text: str) -> set[int]:
    """Latents that fire in a text: the tokenizer, the whole model under a hook of the stage's own, and the SAE, BOS aside."""
    tokenizer = bench.stage.model.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:16]
    acts_TF = sae.encode(bench.stage.reference(SITE, torch.tensor([ids])))
    return set(torch.nonzero((acts_TF[1:] != 0).any(0))[:, 0].tolist())


def test_overlaps_are_those_of_the_model_driven_directly(bench):
    context = bench.context()
    found = table(ParaphraseEvaluator(ParaphraseConfig(texts=24, perturbations=("punctuation",))).evaluate(context))
    tokens, tokenizer = bench.stage.tokens("in_sample"), bench.stage.model.tokenizer
    texts = tokenizer.batch_decode(tokens.tokens(0, 24).tolist(), skip_special_tokens=True)
    for subject in context.subjects:
        for how in ("punctuation",):
            pairs = [(text, other) for i, text in enumerate(texts) if (other := perturb(text, how, i)) != text]
            firsts = [active(bench, subject.sae, text) for text, _ in pairs]
            others = [active(bench, subject.sae, other) for _, other in pairs]
            values = np.array([len(a & b) / len(a | b) for a, b in zip(firsts, others)])
            nulls = np.array([len(a & b) / len(a | b) for a, b in zip(firsts, [*others[1:], others[0]])])
            row = found[subject.id, "in_sample", f"paraphrase_overlap@{how}"]
            assert row.value == pytest.approx(values.mean()) and row.n == len(pairs) > 1
            assert row.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
            assert found[subject.id, "in_sample", f"paraphrase_overlap_null@{how}"].value == pytest.approx(nulls.mean())
    assert row.value > found[subject.id, "in_sample", "paraphrase_overlap_null@punctuation"].value


def test_a_users_pairs(bench, tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [("the cat sat", "the cat sat"), ("a b c d", "a b c d"), ("one two", "one two")]
    file.write_text("".join(json.dumps({"text": a, "paraphrase": b}) + "\n" for a, b in pairs))
    found = table(ParaphraseEvaluator(ParaphraseConfig(perturbations=(), pairs=str(file))).evaluate(bench.context()))
    row = found["first", None, "paraphrase_overlap@pairs"]
    assert row.value == 1 and row.stderr == 0 and row.n == 3 and "pairs.jsonl" in row.note
    assert found["first", None, "paraphrase_overlap_null@pairs"].value < 1
    file.write_text('{"text": "x", "paraphrase": "y"}\n{"text": "only"}\n')
    with pytest.raises(FormatError, match=r"pairs\.jsonl:2 is not a pair"):
        read_pairs(str(file), 10)
    file.write_text('{"text": "x", "paraphrase": "y"}\n')
    with pytest.raises(UsageError, match="holds 1 pairs"):
        read_pairs(str(file), 10)
    with pytest.raises(UsageError, match="does not exist"):
        read_pairs(str(tmp_path / "none.jsonl"), 10)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("how", "text", "other"),
    [
        ("case", "Hello World", "hello world"),
        ("spacing", "a  b\n\tc", "a b c"),
        ("punctuation", "Yes, (it) is: so!", "Yes it is so"),
        ("contractions", "It is here and does not move; they can't.", "It's here and doesn't move; they cannot."),
        ("synonyms", "Use a big list.", "Employ a large sequence."),
        ("synonyms", "misuse listing", "misuse listing"),
    ],
)
def test_perturbations(how, text, other):
    assert perturb(text, how, 0) == other


@pytest.mark.quick
def test_typos_are_few_inner_swaps_and_always_the_same():
    text = " ".join(["wonderful"] * 200)
    changed = perturb(text, "typos", 3)
    assert changed == perturb(text, "typos", 3) != perturb(text, "typos", 4)
    words = [word for word in changed.split() if word != "wonderful"]
    assert 5 <= len(words) <= 40 and all(sorted(word) == sorted("wonderful") and word[0] == "w" and word[-1] == "l" for word in words)


def test_firing_rates_across_texts(bench):
    context = bench.context()
    found = table(DriftEvaluator(DriftConfig(sequences=20)).evaluate(context))
    for subject in context.subjects:
        rates = {}
        for name in ("in_sample", "out_of_sample"):
            tokens = bench.stage.tokens(name)
            last = min(20, tokens.n_sequences)
            acts_TF = subject.sae.encode(bench.stage.reference(SITE, tokens.tokens(0, last)))
            fired_SLF, keep_SL = (acts_TF != 0).view(last, -1, acts_TF.shape[1]), tokens.keep(0, last)
            for half, step in (("", slice(None)), (" even", slice(0, None, 2)), (" odd", slice(1, None, 2))):
                rates[name + half] = fired_SLF[step][keep_SL[step]].double().mean(0).numpy()
        some = (rates["in_sample"] > 0) | (rates["out_of_sample"] > 0)
        row = found[subject.id, "out_of_sample", "drift_rate_correlation"]
        assert row.value == pytest.approx(spearmanr(rates["in_sample"][some], rates["out_of_sample"][some]).statistic)
        even, odd = rates["in_sample even"], rates["in_sample odd"]
        null = spearmanr(even[(even > 0) | (odd > 0)], odd[(even > 0) | (odd > 0)]).statistic
        assert row.stderr > 0 and found[subject.id, "in_sample", "drift_rate_correlation_null"].value == pytest.approx(null)
        assert "no other model" in found[subject.id, "in_sample", "drift_fvu_model"].reason


def test_another_model(bench, tmp_path):
    """The same weights in another folder change nothing; a moved layer norm does, by what the hub's own FVU says."""
    twin = tmp_path / "twin"
    shutil.copytree(bench.stage.spec.name, twin)
    found = table(DriftEvaluator(DriftConfig(model=str(twin), sequences=16)).evaluate(bench.context()))
    for name in bench.saes:
        assert found[name, "in_sample", "drift_overlap_model"].value == 1
        own, other = found[name, "in_sample", "drift_fvu"], found[name, "in_sample", "drift_fvu_model"]
        assert own.value == other.value > 0 and own.n == 16

    from safetensors.torch import load_file, save_file

    weights = load_file(twin / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.0.mlp.down_proj.weight"))
    weights[name] = weights[name] + 0.3 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    context = bench.context()
    moved = table(DriftEvaluator(DriftConfig(model=str(twin), sequences=16)).evaluate(context))
    from saehub.api import ModelSpec
    from saehub.data.model import ModelHandle

    other_stage = Stage(tmp_path / "other")
    other_stage.__dict__["model"] = ModelHandle.load(ModelSpec(name=str(twin), device="cpu", attention="eager"))
    tokens = bench.stage.tokens("in_sample")
    keep = tokens.keep(0, 16).flatten()
    for subject in context.subjects:
        x_ND = other_stage.reference(SITE, tokens.tokens(0, 16))[keep].double()
        mine_ND = bench.stage.reference(SITE, tokens.tokens(0, 16))[keep]
        error = (x_ND - subject.sae(x_ND.float()).double()).square().sum()
        assert moved[subject.id, "in_sample", "drift_fvu_model"].value == pytest.approx(float(error / (x_ND - x_ND.mean(0)).square().sum()), rel=1e-5)
        a, b = (subject.sae.encode(x.float()) != 0 for x in (mine_ND, x_ND))
        union = (a | b).sum(1)
        assert moved[subject.id, "in_sample", "drift_overlap_model"].value == pytest.approx(float(((a & b).sum(1)[union > 0] / union[union > 0]).mean()), rel=1e-5)
    (twin / "tokenizer.json").write_text((twin / "tokenizer.json").read_text().replace("</s>", "<|end|>"))
    refused = table(DriftEvaluator(DriftConfig(model=str(twin), sequences=16)).evaluate(bench.context()))
    assert "another tokenizer" in refused["first", "in_sample", "drift_fvu_model"].reason


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (ParaphraseConfig, {"texts": 1}, "texts"), (ParaphraseConfig, {"perturbations": ("caps",)}, "caps"), (ParaphraseConfig, {"perturbations": ()}, "nothing would be measured"),
        (DriftConfig, {"sequences": 2}, "sequences"), (DriftConfig, {"revision": "x"}, "without a model"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(make, settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


@pytest.mark.quick
def test_a_changed_file_changes_the_stage_key(tmp_path):
    from saehub.pipeline.keys import component_identity
    from saehub.plugins import catalog

    registered = catalog().find("evaluator", "native/paraphrase")
    file = tmp_path / "pairs.jsonl"
    file.write_text("a")
    before = component_identity(registered, ParaphraseConfig(pairs=str(file)))
    file.write_text("b")
    assert before != component_identity(registered, ParaphraseConfig(pairs=str(file)))
    assert "files" not in component_identity(registered, ParaphraseConfig()) and set(PERTURBATIONS) == set(ParaphraseConfig().perturbations)
