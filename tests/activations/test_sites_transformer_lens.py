"""The names that we print for TransformerLens, against what its bridge caches under them; the extractor that reads by them, against ours.

Both in one file, because importing TransformerLens takes longer than all of it.
"""

import shutil
from pathlib import Path

import pytest
import torch

import saehub.builtin
from saehub.activations import taps
from saehub.api import ModelSpec
from saehub.data.model import ModelHandle
from saehub.errors import MissingDependency, UsageError
from saehub.sites import FAMILIES, Site
from saehub.testing.stage import Stage
from saehub.testing.toys import VOCAB, byte_tokenizer
from saehub_native.extract import HFExtractor
from saehub_transformer_lens.config import BridgeConfig
from saehub_transformer_lens.extract import BridgeExtractor


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_the_bridge_holds_the_same_tensors_under_the_printed_names(models, tmp_path, kind):
    models(kind).save_pretrained(tmp_path)
    for file in Path(saehub.builtin.model_dir("tiny-llama")).glob("tokenizer*"):  # the bridge wants one; no text is used
        shutil.copy(file, tmp_path)
    handle = ModelHandle.load(ModelSpec(str(tmp_path), device="cpu", attention="eager"))
    ids_BT = torch.arange(5, 45).reshape(2, 20)
    bridge = handle.bridge()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids_BT)
    torch.testing.assert_close(logits, handle.hf(ids_BT).logits, rtol=1e-5, atol=1e-5)
    for name in FAMILIES[handle.shape.family][1]:
        site = Site(name, None if name == "embed" else 1)
        ours_BTD = taps.read(handle.hf, ids_BT, {0: site.tap(handle.shape)})[0]
        theirs_BTD = cache[site.names(handle.shape)["transformer_lens"]].reshape(ours_BTD.shape)
        torch.testing.assert_close(ours_BTD, theirs_BTD, rtol=1e-5, atol=1e-5 * float(ours_BTD.abs().max()))


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def model_of(models, tmp_path_factory):
    """A tiny model of a family with a byte tokenizer, loaded with the given attention."""
    import transformers

    def get(kind: str, attention: str) -> ModelHandle:
        folder = tmp_path_factory.getbasetemp() / f"bridge-{kind}"
        if not folder.exists():
            config = type(models(kind).config)(**{**models(kind).config.to_dict(), "vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None})
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(5.0)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return ModelHandle.load(ModelSpec(str(folder), device="cpu", attention=attention))

    return get


def sites_of(handle: ModelHandle, layers) -> list[str]:
    """Every named site of the family at these layers."""
    return [str(Site(kind, None if kind == "embed" else at)) for kind in FAMILIES[handle.shape.family][1] for at in (layers if kind != "embed" else [None])]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "gpt_neox_sequential"])
def test_the_bridge_extractor_agrees_with_ours(model_of, stage, kind):
    """At every site that both know, first and last layer included, in float32 under the same attention: 1e-5 relative (row by row, the largest)."""
    handle, tokens = model_of(kind, "eager"), stage.tokens()
    before = {name: tensor.clone() for name, tensor in handle.hf.state_dict().items()}
    for sites in (sites_of(handle, range(handle.shape.n_layers)), ["resid_post.0", "attn_z.1"], ["embed"]):  # all, stopped early, nothing but the embedding
        sessions = [extractor.open(handle, tokens, sites, lm_batch=4) for extractor in (HFExtractor(), BridgeExtractor())]
        assert sessions[0].widths == sessions[1].widths and sessions[0].n_batches == sessions[1].n_batches
        ours, theirs = (session.rows(1) for session in sessions)
        for site in sites:
            a, b = ours.acts[site], theirs.acts[site]
            assert a.dtype == b.dtype and float(((a - b).norm(dim=1) / a.norm(dim=1)).max()) <= 1e-5, site
        for name in ("keep_N", "token_ids_N", "positions_N", "sequences_N"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert all(torch.equal(tensor, before[name]) for name, tensor in handle.hf.state_dict().items())


def test_under_sdpa_it_agrees_to_rounding(model_of, stage):
    """The bridge computes attention by itself, whatever the model does."""
    handle, tokens = model_of("llama", "sdpa"), stage.tokens()
    a, b = (extractor.open(handle, tokens, ["resid_post.2"], lm_batch=4).rows(0).acts["resid_post.2"] for extractor in (HFExtractor(), BridgeExtractor()))
    assert 0 < float((a - b).norm() / a.norm()) < 1e-5


def test_sites_that_transformer_lens_lacks_are_refused(model_of, stage):
    handle, tokens = model_of("gpt_neox", "eager"), stage.tokens()
    config = BridgeConfig()
    assert config.refusal("resid_post.1", handle.shape) is None
    for site, said in {
        "gpt_neox.layers.1.attention:in": "has no hook for",
        "resid_mid.1": "does not exist in the gpt_neox family",
        "resid_post.9": "no layer 9",
        "nonsense": "is not a site",
    }.items():
        assert said in config.refusal(site, handle.shape)
        with pytest.raises(UsageError, match=said):
            BridgeExtractor(config).open(handle, tokens, ["resid_post.1", site], lm_batch=4)
    with pytest.raises(UsageError, match="no site"):
        BridgeExtractor().open(handle, tokens, [], lm_batch=4)
    with pytest.raises(UsageError, match="needs a model"):
        BridgeExtractor().open(None, None, ["embed"], lm_batch=4)


def test_a_plan_refuses_them_at_their_place(model_of, tmp_path):
    from saehub.errors import RecipeError
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.recipe import check_text

    text = f"""
saehub: 1
name: refused
model: {{name: {model_of("gpt2", "eager").spec.name}, device: cpu}}
data: {{train: {{source: builtin/python-docs, tokens: 1_000, context: 32}}}}
extract: {{uses: transformer_lens/bridge, sites: [resid_post.1, "transformer.h.0.ln_1:out"]}}
train: [{{id: small, uses: native/topk, site: resid_post.1, with: {{k: 4, width: 64, batch: 100}}}}]
"""
    recipe, _ = check_text(text, "refused.yaml")
    with pytest.raises(RecipeError) as error:
        make_plan(recipe, catalog(), base=tmp_path)
    assert [problem.path for problem in error.value.problems] == ["extract.sites.1"]
    assert "TransformerLens has no hook for transformer.h.0.ln_1:out" in str(error.value)


def test_a_version_without_the_bridge_is_named(model_of, stage, monkeypatch):
    import transformer_lens.model_bridge

    monkeypatch.delattr(transformer_lens.model_bridge.TransformerBridge, "run_with_cache")
    with pytest.raises(MissingDependency, match="has no 'run_with_cache'") as error:
        BridgeExtractor().open(model_of("llama", "eager"), stage.tokens(), ["embed"], lm_batch=4)
    assert "transformer-lens 3." in str(error.value) and "written for 3.9.0" in str(error.value)
