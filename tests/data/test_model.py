"""Where a model lies, its sizes, its fingerprint, and loading it: against the modules of models built here."""

import json
import shutil

import pytest
import torch
import transformers

from saehub.api import ModelShape, ModelSpec
from saehub.activations.widths import site_width
from saehub.data.model import ModelHandle, fingerprint, local_files, read_shape, shape_of, tokenizer_hash
from saehub.errors import FormatError, SaehubError, StageFailed, UsageError
from saehub.sites import Site

ROTARY = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    head_dim=16,
    vocab_size=97,
    max_position_embeddings=64,
)


@pytest.mark.quick
@pytest.mark.parametrize(
    "config, family",
    [
        (transformers.LlamaConfig(**ROTARY), "llama"),
        (transformers.Qwen3Config(**ROTARY), "llama"),
        (transformers.GemmaConfig(**ROTARY), "llama"),
        (transformers.Gemma2Config(**ROTARY), "gemma2"),
        (transformers.Gemma3TextConfig(**ROTARY), "gemma2"),
        (transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=97, n_positions=64, n_inner=48), "gpt2"),
        (
            transformers.GPTNeoXConfig(
                **{k: v for k, v in ROTARY.items() if k not in ("head_dim", "num_key_value_heads")} | {"num_attention_heads": 2}
            ),
            "gpt_neox",
        ),
        (
            transformers.BertConfig(
                **{k: v for k, v in ROTARY.items() if k not in ("head_dim", "num_key_value_heads")} | {"num_attention_heads": 2}
            ),
            "bert",
        ),
    ],
)
def test_sizes_are_read_from_what_transformers_saves(tmp_path, config, family):
    config.save_pretrained(tmp_path)
    heads = 2 if family in ("gpt2", "gpt_neox", "bert") else 4
    assert read_shape(str(tmp_path)) == ModelShape(family, 3, 32, 48, heads, 16, 97, 64)


@pytest.mark.quick
def test_sizes_left_to_defaults_are_asked_of_transformers():
    """Published Gemma configs leave heads, vocabulary and positions to their class's defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    shape = shape_of({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text})
    default = transformers.Gemma3TextConfig()
    assert shape == ModelShape(
        "gemma2", 34, 2560, 10240, default.num_attention_heads, default.head_dim, default.vocab_size, default.max_position_embeddings
    )
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    assert shape_of(gpt2) == ModelShape("gpt2", 12, 768, 3072, 12, 64, 50257, 1024)


@pytest.mark.quick
def test_a_declared_shape_serves_offline_and_must_agree(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    declared = ModelShape("llama", 32, 4096, 14336, 32, 128, 128256, 131072)
    assert read_shape("no-org/no-such-model", None, declared) == declared
    with pytest.raises(UsageError) as caught:
        read_shape("no-org/no-such-model")
    assert (
        "no-org/no-such-model" in str(caught.value)
        and "hf download no-org/no-such-model" in caught.value.fix
        and "model.shape" in caught.value.fix
    )
    with pytest.raises(UsageError, match="no-org/no-such-model"):
        ModelHandle.load(ModelSpec("no-org/no-such-model"))
    assert fingerprint(ModelSpec("no-org/no-such-model")) == "hub:no-org/no-such-model@?main"
    transformers.LlamaConfig(**ROTARY).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="n_layers: 32 declared, 3 in config.json"):
        read_shape(str(tmp_path), None, declared)


@pytest.mark.quick
def test_models_of_the_hub_are_found_in_its_cache(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--tiny"
    snapshot = folder / "snapshots" / ("c" * 40)
    shutil.copytree(model_dir, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    assert local_files("org/tiny") == snapshot
    assert read_shape("org/tiny").n_layers == 2
    assert fingerprint(ModelSpec("org/tiny")) == "hub:org/tiny@" + "c" * 40
    assert tokenizer_hash(ModelSpec("org/tiny")) == tokenizer_hash(ModelSpec(str(model_dir)))


@pytest.mark.quick
def test_the_fingerprint_follows_the_contents(tmp_path):
    for name in ("a", "b"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY)).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    a, b, c = (fingerprint(ModelSpec(str(tmp_path / name))) for name in "abc")
    assert a == c != b
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert fingerprint(ModelSpec(str(tmp_path / "c"))) != a


@pytest.mark.quick
def test_loading_gives_the_model_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY)).eval()
    model.save_pretrained(tmp_path)
    handle = ModelHandle.load(ModelSpec(str(tmp_path), device="cpu"), tokenizer=False)
    ids = torch.arange(10)[None]
    assert torch.equal(handle.hf(ids).logits, model(ids).logits)
    assert not handle.hf.training and not any(p.requires_grad for p in handle.hf.parameters())
    assert handle.shape == shape_of(model.config.to_dict()) and handle.fingerprint.startswith("sha256:") and handle.device == "cpu"
    half = ModelHandle.load(ModelSpec(str(tmp_path), dtype="bfloat16", attention="eager"), tokenizer=False).hf
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"


@pytest.mark.quick
def test_encoders_and_bare_models_load_with_the_right_class(tmp_path):
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97, max_position_embeddings=64
    )
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "mlm")
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bare")
    assert type(ModelHandle.load(ModelSpec(str(tmp_path / "mlm")), tokenizer=False).hf).__name__ == "BertForMaskedLM"
    assert type(ModelHandle.load(ModelSpec(str(tmp_path / "bare")), tokenizer=False).hf).__name__ == "BertModel"


@pytest.mark.quick
def test_what_cannot_be_loaded_is_named(tmp_path, model_dir):
    def fails(kind, *words, **spec):
        with pytest.raises(kind) as caught:
            ModelHandle.load(ModelSpec(**spec))
        assert isinstance(caught.value, SaehubError) and caught.value.fix
        assert all(word in str(caught.value) for word in words), str(caught.value)

    fails(UsageError, "no such directory", name=str(tmp_path / "missing"))
    fails(UsageError, "no such directory", name="./missing")
    fails(UsageError, "no config.json", name=str(tmp_path))
    fails(UsageError, "builtin/tiny-llama", name="builtin/tiny-lama")
    fails(UsageError, "device 'cuda:99'", name=str(model_dir), device="cuda:99")
    fails(UsageError, "float8", name=str(model_dir), dtype="float8")
    fails(StageFailed, str(model_dir), name=str(model_dir))  # a config without weights
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    fails(FormatError, "config.json", name=str(broken))
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**ROTARY)).save_pretrained(tmp_path / "gemma2")
    fails(StageFailed, "eager", name=str(tmp_path / "gemma2"))


@pytest.mark.quick
def test_widths_of_any_module_without_weights(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY)).save_pretrained(tmp_path)
    spec, shape = ModelSpec(str(tmp_path)), read_shape(str(tmp_path))
    for name, width in {
        "model.layers.1.self_attn.k_proj:out": 32,
        "model.layers.1.self_attn.q_proj:out": 64,
        "model.layers.0.mlp.gate_proj:out": 48,
        "attn_z.1": 64,
        "mlp_act.0": 48,
        "model.layers.1:out": 32,
        "lm_head:out": 97,
    }.items():
        assert site_width(spec, Site.parse(name), shape) == width
    with pytest.raises(UsageError, match="cannot be read"):
        site_width(spec, Site.parse("model.rotary_emb:out"), shape)
    with pytest.raises(UsageError, match="no module"):
        site_width(spec, Site.parse("model.layers.1.mlp.gate_prj:out"), shape)


def test_the_bridge_shares_the_weights_and_leaves_the_model_alone():
    from saehub.activations import taps

    handle = ModelHandle.load(ModelSpec("builtin/tiny-llama", device="cpu", attention="eager"))
    names = [name for name, _ in handle.hf.named_modules()]
    ids = torch.arange(5, 45).reshape(2, 20)
    before = handle.hf(ids).logits
    bridge = handle.bridge()
    assert handle.bridge() is bridge and handle.view("transformer_lens/bridge") is bridge
    with pytest.raises(UsageError, match="native/hf reads the model as it is"):
        handle.view("native/hf")
    assert [name for name, _ in handle.hf.named_modules()] == names and torch.equal(handle.hf(ids).logits, before)
    ours = {parameter.data_ptr() for parameter in handle.hf.parameters()}
    own = [parameter for parameter in bridge.parameters() if parameter.data_ptr() not in ours]
    assert all(not parameter.any() for parameter in own) and len(own) <= 1  # it adds a bias of zeros to the unembedding
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-5)
    for kind in ("resid_pre", "resid_mid", "resid_post", "attn_z", "attn_out", "mlp_in", "mlp_act", "mlp_out"):
        site = Site(kind, 2)
        ours_BTD = taps.read(handle.hf, ids, {0: site.tap(handle.shape)})[0]
        theirs = cache[site.names(handle.shape)["transformer_lens"]]
        torch.testing.assert_close(ours_BTD, theirs.reshape(ours_BTD.shape), rtol=1e-5, atol=1e-5)
