"""Which evaluator will not measure which SAE: said when a recipe is planned, whether the SAE is trained by it or loaded."""

from __future__ import annotations

import pytest

from saehub.checkpoint.format import save
from saehub.pipeline.plan import make_plan
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.testing.saes import random_sae
from saehub.testing.toys import tiny_model

RECIPE = """
saehub: 1
name: pairs
model: {{name: {folder}/model, device: cpu}}
data:
  train: {{source: builtin/python-docs, tokens: 1_000, context: 32}}
  eval: {{in_sample: {{source: builtin/python-docs, tokens: 500}}}}
extract: {{sites: [mlp_in.0, mlp_out.0, "model.layers.0.self_attn.q_proj:out"]}}
train:
  - {{id: same, uses: native/topk, site: mlp_out.0, with: {{k: 4, width: 64, batch: 100}}}}
  - {{id: across, uses: native/topk, site: mlp_in.0, target_site: mlp_out.0, with: {{k: 4, width: 64, batch: 100}}}}
  - {{id: inside, uses: native/topk, site: "model.layers.0.self_attn.q_proj:out", with: {{k: 4, width: 64, batch: 100}}}}
saes:
  - {{id: loaded, load: "{folder}/skip"}}
evaluate:
  - {{uses: saelens/evals}}
  - {{uses: saebench/core}}
  - {{uses: dictionary_learning/evaluate}}
  - {{uses: native/core}}
"""


@pytest.mark.quick
def test_a_plan_says_what_will_not_be_measured(tmp_path):
    tiny_model(tmp_path / "model")
    save(random_sae("relu", d_in=32, d_out=32, kind="skip_transcoder", subtract_b_dec=False), tmp_path / "skip", site="mlp_in.0", target_site="mlp_out.0")
    recipe, problems = check_text(RECIPE.format(folder=tmp_path), "pairs.yaml")
    assert not [problem for problem in problems if problem.severity == "error"]
    plan = make_plan(recipe, catalog(), base=tmp_path / "home")
    said = [text for text in plan.warnings if "will not measure" in text]
    assert said[0].startswith("saelens/evals will not measure across, loaded: SAELens' evals compare")
    assert [text.partition(":")[0] for text in said[1:]] == [
        "saelens/evals will not measure inside",
        "saebench/core will not measure across",
        "saebench/core will not measure inside",
        "saebench/core will not measure loaded",
        "dictionary_learning/evaluate will not measure across",
        "dictionary_learning/evaluate will not measure loaded",
    ]
    assert "saebench/core will not measure inside: model.layers.0.self_attn.q_proj:out has no TransformerLens hook" in said[3]
    assert any(stage.id == "evaluate/saelens/evals/across" for stage in plan.of("evaluate"))  # the results say so too


@pytest.mark.quick
def test_a_saebench_eval_names_the_sites_that_it_cannot_read():
    from saehub.api import PlannedSAE
    from saehub_saebench import config

    def refused(settings, **known):
        return settings.refusal(PlannedSAE("a", **known)) or ""

    assert "wrong tensor" in refused(config.AbsorptionConfig(), site="mlp_out.1")
    assert refused(config.AbsorptionConfig(), site="resid_post.1") == "" == refused(config.CoreConfig(), site="attn_z.1")
    assert "heads × width" in refused(config.SaeProbesConfig(), site="attn_z.1")
    assert "no TransformerLens hook" in refused(config.CoreConfig(), site="embed")
    assert "needs whole sequences" in refused(config.SaeProbesConfig(), architecture="temporal", row_wise=False)
    assert refused(config.CoreConfig(), architecture="temporal", row_wise=False) == ""
    assert refused(config.CoreConfig(), site="my file") == "", "only a run can judge a name of the user's own files"


def test_an_sae_whose_encoder_is_its_decoder(tmp_path):
    """Matching pursuit has no W_enc: native/stability matches along the decoder."""
    import torch

    from saehub_native.evaluate.stability.pairs import Dictionary

    sae = random_sae("matching_pursuit", d_in=16)
    directions = Dictionary.of(sae)
    assert torch.equal(directions.encoder_FD, sae.tensors()["W_dec"]) and directions.decoder_FD.dtype == torch.float32
