"""Every row of the site table against recomputation from the model's own submodules, and interventions against hand-made ones."""

import pytest
import torch
from torch.nn import functional as F

from saehub.activations import taps
from saehub.data.model import shape_of
from saehub.sites import FAMILIES, Site, Tap

KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "smollm3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "bert",
    "roberta",
)
L = 1


def plain_hooks(model, wanted, tokens_BT):
    """An independent reading: one forward hook and one pre-hook a module, the whole model run."""
    found, handles = {}, []
    modules = dict(model.named_modules())

    def first(value):
        return value if isinstance(value, torch.Tensor) else value[0]

    for path, io in wanted:
        if io == "out":
            handles.append(
                modules[path].register_forward_hook(lambda m, a, out, key=(path, io): found.__setitem__(key, first(out).clone()))
            )
        else:

            def before(m, args, kwargs, key=(path, io)):
                found[key] = (args[0] if args else kwargs["hidden_states"]).clone()

            handles.append(modules[path].register_forward_pre_hook(before, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=tokens_BT)
    for handle in handles:
        handle.remove()
    return found


def all_sites(shape):
    names = FAMILIES[shape.family][1]
    return [
        Site(kind, None if kind == "embed" else layer) for kind in names for layer in ((0,) if kind == "embed" else range(shape.n_layers))
    ]


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_read_equals_plain_hooks_and_equal_taps_agree(models, kind, tokens_BT):
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    sites = all_sites(shape)
    got = taps.read(model, tokens_BT, {str(site): site.tap(shape) for site in sites})
    equal = {str(site): [tuple(tap.rsplit(":", 1)) for tap in site._taps(shape)] for site in sites}
    want = plain_hooks(model, {tap for group in equal.values() for tap in group}, tokens_BT)
    for site in sites:
        assert got[str(site)].shape == (*tokens_BT.shape, site.width(shape)), site
        for tap in equal[str(site)]:
            assert torch.equal(got[str(site)], want[tap]), (site, tap)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_sites_mean_what_the_table_says(models, kind, tokens_BT):
    """resid_mid = resid_pre + attn_out; resid_post = resid_mid + mlp_out (post-norm encoders: its norm); z and mlp_act through their own weights."""
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    names = FAMILIES[shape.family][1]
    sites = {kind: Site(kind, None if kind == "embed" else L) for kind in names}
    x = taps.read(model, tokens_BT, {name: site.tap(shape) for name, site in sites.items()})
    block = taps.resolve(model, Site("resid_post", L).tap(shape).module)
    close = dict(rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        if "resid_mid" in names:
            torch.testing.assert_close(x["resid_mid"], x["resid_pre"] + x["attn_out"], **close)
            middle = x["resid_mid"]
        else:
            assert shape.family == "gpt_neox"
            middle = x["resid_pre"] + x["attn_out"]
        if shape.family in ("bert", "roberta"):
            torch.testing.assert_close(x["mlp_in"], block.attention.output.LayerNorm(middle), **close)
            torch.testing.assert_close(x["resid_post"], block.output.LayerNorm(x["mlp_in"] + x["mlp_out"]), **close)
            torch.testing.assert_close(x["attn_out"], block.attention.output.dense(x["attn_z"]), **close)
            torch.testing.assert_close(x["mlp_act"], F.gelu(block.intermediate.dense(x["mlp_in"])), **close)
            torch.testing.assert_close(x["mlp_out"], block.output.dense(x["mlp_act"]), **close)
            return
        torch.testing.assert_close(x["resid_post"], middle + x["mlp_out"], **close)
        if shape.family in ("llama", "gemma2"):
            after_attn = block.post_attention_layernorm if shape.family == "gemma2" else torch.nn.Identity()
            after_mlp = block.post_feedforward_layernorm if shape.family == "gemma2" else torch.nn.Identity()
            norm = block.pre_feedforward_layernorm if shape.family == "gemma2" else block.post_attention_layernorm
            torch.testing.assert_close(x["attn_out"], after_attn(block.self_attn.o_proj(x["attn_z"])), **close)
            torch.testing.assert_close(x["mlp_in"], norm(x["resid_mid"]), **close)
            torch.testing.assert_close(
                x["mlp_act"], block.mlp.act_fn(block.mlp.gate_proj(x["mlp_in"])) * block.mlp.up_proj(x["mlp_in"]), **close
            )
            torch.testing.assert_close(x["mlp_out"], after_mlp(block.mlp.down_proj(x["mlp_act"])), **close)
        elif shape.family == "gpt2":
            torch.testing.assert_close(x["attn_out"], block.attn.c_proj(x["attn_z"]), **close)
            torch.testing.assert_close(x["mlp_in"], block.ln_2(x["resid_mid"]), **close)
            torch.testing.assert_close(x["mlp_out"], block.mlp.c_proj(x["mlp_act"]), **close)
        else:
            read_by_mlp = x["resid_pre"] if shape.family == "gpt_neox" else x["resid_mid"]
            torch.testing.assert_close(x["attn_out"], block.attention.dense(x["attn_z"]), **close)
            torch.testing.assert_close(x["mlp_in"], block.post_attention_layernorm(read_by_mlp), **close)
            torch.testing.assert_close(x["mlp_act"], F.gelu(block.mlp.dense_h_to_4h(x["mlp_in"])), **close)
            torch.testing.assert_close(x["mlp_out"], block.mlp.dense_4h_to_h(x["mlp_act"]), **close)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_agree_except_the_last_which_is_normed(models, kind, tokens_BT):
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    x = taps.read(model, tokens_BT, {layer: Site("resid_post", layer).tap(shape) for layer in range(shape.n_layers)})
    with torch.no_grad():
        states = model(input_ids=tokens_BT, output_hidden_states=True).hidden_states
    for layer in range(shape.n_layers - 1):
        assert torch.equal(x[layer], states[layer + 1])
    if shape.family not in ("bert", "roberta"):
        assert not torch.allclose(x[shape.n_layers - 1], states[-1])


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_identity_splice_leaves_the_logits_alone(models, kind, tokens_BT):
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    with torch.no_grad():
        want = model(input_ids=tokens_BT).logits
    assert torch.equal(taps.logits(model, tokens_BT), want)
    for site in all_sites(shape):
        assert torch.equal(taps.splice(model, tokens_BT, site.tap(shape), lambda x: x), want), site
        if site.layer == L:
            changed = taps.splice(
                model, tokens_BT, site.tap(shape), lambda x: x + torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0))
            )
            assert not torch.allclose(changed, want, atol=1e-4), site


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox_sequential"])
def test_a_change_of_resid_mid_reaches_both_its_uses(models, kind, tokens_BT):
    """Adding c to resid_mid is the same as adding c to attn_out; zeroing mlp_out makes resid_post = resid_mid."""
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    shift = torch.randn(shape.d_model, generator=torch.Generator().manual_seed(1))
    one = taps.splice(model, tokens_BT, Site("resid_mid", L).tap(shape), lambda x: x + shift)
    other = taps.splice(model, tokens_BT, Site("attn_out", L).tap(shape), lambda x: x + shift)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    middle = taps.read(model, tokens_BT, {0: Site("resid_mid", L).tap(shape)})[0]
    without = taps.splice(model, tokens_BT, Site("mlp_out", L).tap(shape), torch.zeros_like)
    set_back = taps.splice(model, tokens_BT, Site("resid_post", L).tap(shape), lambda x: middle)
    torch.testing.assert_close(without, set_back, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_resid_post_splice_equals_resid_pre_of_the_next_layer(models, tokens_BT):
    model = models("llama")
    shape = shape_of(model.config.to_dict())
    one = taps.splice(model, tokens_BT, Site("resid_post", 0).tap(shape), lambda x: 0.5 * x)
    assert torch.equal(one, taps.splice(model, tokens_BT, Site("resid_pre", 1).tap(shape), lambda x: 0.5 * x))


@pytest.mark.quick
def test_older_layers_that_return_tuples_are_read_and_spliced(models, tokens_BT):
    """Before transformers 5 a decoder layer returned a tuple; the wrapper below restores that."""
    model = models("llama")
    shape = shape_of(model.config.to_dict())

    class Old(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return (self.inner(*args, **kwargs), None)

    class Unpack(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.old = Old(inner)

        def forward(self, *args, **kwargs):
            return self.old(*args, **kwargs)[0]

    tap = Site("resid_post", L).tap(shape)
    want = taps.read(model, tokens_BT, {0: tap})[0]
    halved = taps.splice(model, tokens_BT, tap, lambda x: x / 2)
    inner = model.model.layers[L]
    model.model.layers[L] = Unpack(inner)
    try:
        assert torch.equal(taps.read(model, tokens_BT, {0: Tap(f"model.layers.{L}.old", "out")})[0], want)
        assert torch.equal(taps.splice(model, tokens_BT, Tap(f"model.layers.{L}.old", "out"), lambda x: x / 2), halved)
    finally:
        model.model.layers[L] = inner
