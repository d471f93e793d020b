"""FVU, L0, cosine, cross-entropy and KL against sae_lens.evals and dictionary_learning.evaluation on the same weights, model and tokens.

Their definitions, and what is done to compare:

* sae_lens: `explained_variance` is 1 - FVU (pooled R²); `mse` is per row, ours per coordinate (× d). Its losses are per token, and its
  zero-ablation also zeroes ignored positions (ours keeps them), so ablations are compared on text without any; its KL covers the last
  position too, which has no next token, and is cut here.
* dictionary_learning: `frac_variance_explained` forgives a constant error, as our explained variance does, and averages over batches, so it
  is given all rows as one. Its losses count every position, compared on text without exclusions.
"""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import pytest
import torch

from saehub.api import EvalDataset
from saehub.testing.toys import byte_tokenizer

os.environ.setdefault("WANDB_MODE", "disabled")
SITE, HOOK = "resid_post.0", "blocks.0.hook_resid_post"


def dataset(plain, *, exclude: bool, seed: int = 11) -> EvalDataset:
    tokens = plain.Tokens(20, seed, exclude=exclude)
    tokens.keep_ST = tokens.ids_ST != plain.BOS  # the one rule that all three can be told
    return EvalDataset("in_sample", tokens, "h")


@pytest.fixture(scope="module")
def lens(stage, fitted):
    """sae_lens' evals, the same model as a bridge, and the same SAE as its TopKSAE."""
    from sae_lens import TopKSAE, TopKSAEConfig, evals
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler

    ours = fitted()
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny", prepend_bos=False)
    theirs = TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=6, apply_b_dec_to_input=True, dtype="float32", device="cpu", metadata=metadata))
    theirs.load_state_dict({name: t.clone() for name, t in ours.tensors().items()}, strict=True)
    with torch.no_grad():
        bridge = stage.model.bridge()
    return SimpleNamespace(evals=evals, model=bridge, sae=theirs.eval(), ours=ours, scaler=ActivationScaler())


def test_sae_lens_sparsity_and_variance(lens, context, measure, plain):
    data = dataset(plain, exclude=True)
    found = measure(context({"a": (lens.ours, SITE, None)}, data={"in_sample": data}), loss=False)
    batches = iter(data.tokens.ids_ST.split(5))
    with torch.no_grad():
        theirs, per_feature = lens.evals.get_sparsity_and_variance_metrics(
            lens.sae, lens.model, SimpleNamespace(get_batch_tokens=lambda _n: next(batches)), lens.scaler, n_batches=4, eval_batch_size_prompts=5,
            compute_l2_norms=False, compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
            model_kwargs={}, ignore_tokens=[plain.BOS],
        )  # fmt: skip

    def value(metric):
        return found["a", "in_sample", metric].value

    assert value("fvu") == pytest.approx(1 - theirs["explained_variance"], rel=1e-4)
    assert value("mse") == pytest.approx(theirs["mse"] / 32, rel=1e-5)
    assert value("l0") == pytest.approx(theirs["l0"], rel=1e-6)
    assert value("l1") == pytest.approx(theirs["l1"], rel=1e-5)
    assert value("cosine") == pytest.approx(theirs["cossim"], rel=1e-5)
    densities = torch.tensor(per_feature["feature_density"])
    assert value("never_fired_share") == pytest.approx(float((densities == 0).double().mean()))
    assert value("feature_density") == pytest.approx(float(densities.mean()), rel=1e-5)


def test_sae_lens_losses_with_ignored_positions(lens, context, measure, plain):
    data = dataset(plain, exclude=True)
    found = measure(context({"a": (lens.ours, SITE, None)}, data={"in_sample": data}))
    ids_ST = data.tokens.ids_ST
    with torch.no_grad():
        theirs = lens.evals.get_recons_loss(lens.sae, lens.model, lens.scaler, ids_ST, compute_kl=True, compute_ce_loss=True, ignore_tokens=[plain.BOS])
    counted = data.tokens.keep_ST[:, :-1] & data.tokens.keep_ST[:, 1:]
    for metric, values_ST in (
        ("ce_clean", theirs["ce_loss_without_sae"]), ("ce_spliced", theirs["ce_loss_with_sae"]), ("kl_spliced", theirs["kl_div_with_sae"][:, :-1]),
    ):  # fmt: skip
        assert found["a", "in_sample", metric].value == pytest.approx(float(values_ST[counted].double().mean()), rel=2e-5), metric


def test_sae_lens_scores_on_text_without_exclusions(lens, context, measure, plain):
    data = dataset(plain, exclude=False)
    assert data.tokens.keep_ST.all()
    found = measure(context({"a": (lens.ours, SITE, None)}, data={"in_sample": data}))
    batches = iter(data.tokens.ids_ST.split(5))
    with torch.no_grad():
        theirs = lens.evals.get_downstream_reconstruction_metrics(
            lens.sae, lens.model, SimpleNamespace(get_batch_tokens=lambda _n: next(batches)), lens.scaler, compute_kl=False, compute_ce_loss=True,
            n_batches=4, eval_batch_size_prompts=5, ignore_tokens=None,
        )  # fmt: skip
        kl = lens.evals.get_recons_loss(lens.sae, lens.model, lens.scaler, data.tokens.ids_ST, compute_kl=True, compute_ce_loss=False)
    for metric, name in (("ce_clean", "ce_loss_without_sae"), ("ce_spliced", "ce_loss_with_sae"), ("ce_zero", "ce_loss_with_ablation")):
        assert found["a", "in_sample", metric].value == pytest.approx(theirs[name], rel=2e-5), metric
    gap = theirs["ce_loss_with_ablation"] - theirs["ce_loss_without_sae"]
    assert found["a", "in_sample", "ce_recovered_zero"].value == pytest.approx(theirs["ce_loss_score"], abs=1e-5 * theirs["ce_loss_with_sae"] / abs(gap))
    spliced, ablated = (float(kl[name][:, :-1].double().mean()) for name in ("kl_div_with_sae", "kl_div_with_ablation"))
    assert found["a", "in_sample", "kl_zero"].value == pytest.approx(ablated, rel=2e-5)
    assert found["a", "in_sample", "kl_recovered_zero"].value == pytest.approx((ablated - spliced) / ablated, rel=2e-5)


@pytest.fixture(scope="module")
def learning(fitted):
    """dictionary_learning's evaluation, and the same SAE as its AutoEncoderTopK."""
    from dictionary_learning import evaluation
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    ours = fitted()
    theirs = AutoEncoderTopK(32, 64, 6)
    theirs.load_state_dict({
        "encoder.weight": ours.W_enc.T.clone(), "encoder.bias": ours.b_enc.clone(), "decoder.weight": ours.W_dec.T.clone(), "b_dec": ours.b_dec.clone(),
        "k": torch.tensor(6), "threshold": torch.tensor(-1.0),
    })  # fmt: skip
    return SimpleNamespace(evaluation=evaluation, dictionary=theirs, ours=ours)


def test_dictionary_learning_evaluate(learning, context, measure, plain, activations):
    data = dataset(plain, exclude=True)
    found = measure(context({"a": (learning.ours, SITE, None)}, data={"in_sample": data}), loss=False)
    rows_ND = activations(data, SITE)[data.tokens.keep_ST]
    theirs = learning.evaluation.evaluate(learning.dictionary, iter([rows_ND]))
    for metric, name in (("explained_variance", "frac_variance_explained"), ("l0", "l0"), ("l1", "l1_loss"), ("cosine", "cossim")):
        assert found["a", "in_sample", metric].value == pytest.approx(theirs[name], rel=2e-5), metric
    assert found["a", "in_sample", "never_fired_share"].value == pytest.approx(1 - theirs["frac_alive"], abs=1e-6)
    # Not the same number, and named so: FVU also counts the constant error.
    assert 1 - found["a", "in_sample", "fvu"].value <= found["a", "in_sample", "explained_variance"].value


def test_dictionary_learning_loss_recovered(learning, stage, context, measure, plain):
    from nnsight import LanguageModel

    data = dataset(plain, exclude=False)
    found = measure(context({"a": (learning.ours, SITE, None)}, data={"in_sample": data}))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"  # nnsight pads; no such token is in the text
    model = LanguageModel(copy.deepcopy(stage.model.hf), tokenizer=tokenizer)
    with torch.no_grad():
        clean, spliced, zero = learning.evaluation.loss_recovered(data.tokens.ids_ST, model, model.model.layers[0], learning.dictionary)
    for metric, value in (("ce_clean", clean), ("ce_spliced", spliced), ("ce_zero", zero)):
        assert found["a", "in_sample", metric].value == pytest.approx(float(value), rel=2e-5), metric
