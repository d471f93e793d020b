"""Names of sites: what parses, what each library calls it, and what the errors say. (What the names mean is checked in test_sites_numeric.)"""

from dataclasses import replace

import pytest

from saehub.api import ModelShape
from saehub.errors import UsageError
from saehub.sites import FAMILIES, KINDS, Site, Tap

LLAMA = ModelShape("llama", 6, 128, 512, 4, 16, 4096, 256)
PYTHIA = replace(LLAMA, family="gpt_neox")
GPT2 = replace(LLAMA, family="gpt2")
GEMMA2 = replace(LLAMA, family="gemma2")


@pytest.mark.quick
@pytest.mark.parametrize("text", ["resid_post.6", "embed", "attn_z.0", "model.layers.6.mlp.down_proj:in", "transformer.h.3:out"])
def test_canonical_strings_round_trip(text):
    assert str(Site.parse(text)) == text and Site.parse(Site.parse(text)) == Site.parse(text) and str(Site.parse(f" {text} ")) == text


@pytest.mark.quick
@pytest.mark.parametrize(
    "shape, site, lens, hf, sparsify, nnsight",
    [
        (LLAMA, "resid_post.2", "blocks.2.hook_resid_post", "model.layers.2:out", "layers.2", "model.layers[2].output"),
        (LLAMA, "resid_pre.0", "blocks.0.hook_resid_pre", "model.layers.0:in", None, "model.layers[0].input"),
        (LLAMA, "resid_pre.3", "blocks.3.hook_resid_pre", "model.layers.3:in", "layers.2", "model.layers[3].input"),
        (
            LLAMA,
            "resid_mid.2",
            "blocks.2.hook_resid_mid",
            "model.layers.2.post_attention_layernorm:in",
            None,
            "model.layers[2].post_attention_layernorm.input",
        ),
        (LLAMA, "attn_z.1", "blocks.1.attn.hook_z", "model.layers.1.self_attn.o_proj:in", None, "model.layers[1].self_attn.o_proj.input"),
        (LLAMA, "mlp_out.1", "blocks.1.hook_mlp_out", "model.layers.1.mlp:out", "layers.1.mlp", "model.layers[1].mlp.output"),
        (
            LLAMA,
            "mlp_in.1",
            "blocks.1.mlp.hook_in",
            "model.layers.1.mlp:in",
            "layers.1.post_attention_layernorm",
            "model.layers[1].mlp.input",
        ),
        (LLAMA, "embed", "hook_embed", "model.embed_tokens:out", "embed_tokens", "model.embed_tokens.output"),
        (
            GEMMA2,
            "mlp_out.1",
            "blocks.1.hook_mlp_out",
            "model.layers.1.post_feedforward_layernorm:out",
            "layers.1.post_feedforward_layernorm",
            None,
        ),
        (GPT2, "resid_post.2", "blocks.2.hook_resid_post", "transformer.h.2:out", "h.2", "transformer.h[2].output"),
        (GPT2, "mlp_act.2", "blocks.2.mlp.hook_post", "transformer.h.2.mlp.c_proj:in", None, "transformer.h[2].mlp.c_proj.input"),
        (
            PYTHIA,
            "attn_out.4",
            "blocks.4.hook_attn_out",
            "gpt_neox.layers.4.attention:out",
            "layers.4.attention",
            "gpt_neox.layers[4].attention.output",
        ),
    ],
)
def test_names_in_the_libraries_and_back(shape, site, lens, hf, sparsify, nnsight):
    names = Site.parse(site).names(shape)
    assert names["transformer_lens"] == lens and names["hf"] == hf and names["sparsify"] == sparsify
    assert nnsight is None or names["nnsight"] == nnsight
    for name in names.values():
        if name is not None:
            back = Site.from_foreign(name, shape)
            # the output of block L - 1 is the input of block L: the same tensor under its other name
            assert str(back) == site or (site == "resid_pre.3" and str(back) == "resid_post.2"), name


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_survives_every_naming(family):
    shape = replace(LLAMA, family=family)
    for kind in FAMILIES[family][1]:
        site = Site(kind, None if kind == "embed" else 3)
        for library, name in site.names(shape).items():
            if name is not None and not (kind == "resid_pre" and library == "sparsify"):
                assert Site.from_foreign(name, shape) == site, (library, name)


@pytest.mark.quick
def test_other_spellings():
    for name in (
        "model.layers.6",
        "layers.6",
        "model.layers[6].output",
        "model.layers[6].output[0]",
        "model.layers.6:out",
        "blocks.6.hook_out",
    ):
        assert str(Site.from_foreign(name, replace(LLAMA, n_layers=8))) == "resid_post.6"
    assert str(Site.from_foreign("layers.2.self_attn.q_proj", LLAMA)) == "model.layers.2.self_attn.q_proj:out"
    assert (
        str(Site.from_foreign("layers.2.mlp", GEMMA2)) == "model.layers.2.mlp:out"
    )  # before Gemma's extra norm: not what is added to the stream
    assert Site.parse("resid_mid.1").tap(LLAMA) == Tap("model.layers.1.post_attention_layernorm", "in", shared=True)
    assert Site.parse("encoder.blocks.1:out").tap(replace(LLAMA, family="other")) == Tap("encoder.blocks.1", "out")


@pytest.mark.quick
def test_widths():
    assert {kind: Site(kind, None if kind == "embed" else 1).width(LLAMA) for kind in KINDS} == {
        **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out", "embed"), 128), "attn_z": 64, "mlp_act": 512}  # fmt: skip
    assert Site.parse("model.layers.2.mlp.down_proj:in").width(LLAMA) == 512
    assert Site.parse("model.layers.2.self_attn.k_proj:out").width(LLAMA) is None


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, words",
    [
        ("resid_pots.2", ["did you mean 'resid_post'"]),
        ("resid_post", ["needs a layer number", "resid_post.2"]),
        ("embed.1", ["`embed` has no layer"]),
        ("blocks.2.hook_resid_post", ["TransformerLens", "resid_post.2"]),
        ("model.layers.2", ["needs `:in` or `:out`", "model.layers.2:out"]),
        ("resid_post.-1", ["resid_post"]),
        ("", ["a site is one of"]),
        ("model.layers.2:both", ["model.layers.2:both"]),
    ],
)
def test_what_is_not_a_site_says_what_would_be(text, words):
    with pytest.raises(UsageError) as caught:
        Site.parse(text)
    assert caught.value.fix and all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.quick
def test_what_a_model_lacks_names_what_it_has():
    def fails(call, *words):
        with pytest.raises(UsageError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)

    fails(lambda: Site.parse("resid_post.6").tap(LLAMA), "no layer 6", "6 layers, 0 to 5", "resid_post.5")
    fails(lambda: Site.parse("resid_post.6").width(LLAMA), "no layer 6")
    fails(lambda: Site.parse("resid_mid.1").tap(PYTHIA), "parallel", "resid_pre, resid_post")
    fails(lambda: Site.parse("resid_post.1").tap(replace(LLAMA, family="other")), "'other'", "name the module")
    fails(lambda: Site.from_foreign("blocks.2.ln2.hook_normalized", LLAMA), "before the gain", "mlp_in.2")
    fails(lambda: Site.from_foreign("blocks.2.hook_mlp_in", LLAMA), "resid_mid.2")
    fails(lambda: Site.from_foreign("what is this?", LLAMA), "not a name of a tensor")
