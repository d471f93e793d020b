"""Compiled norms, activations and attention beside float64; `native/hf` in bfloat16 on them beside the plain float32 model."""

import math

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from saehub_native import extract, extract_fused
from saehub_native.extract_fused import ACTIVATIONS, Work, fused

ROUNDING = 2.0**-8  # of bfloat16: half of its last bit
SIZES = dict(vocab_size=61, num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=96, max_position_embeddings=32)
GROUPED = dict(SIZES, num_key_value_heads=2)
TOYS = {  # and which modules of a block the loops take over
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), {"LlamaRMSNorm", "LlamaAttention", "SiLUActivation"}),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)), {"Qwen2RMSNorm", "Qwen2Attention", "SiLUActivation"}),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=16)), {"Qwen3RMSNorm", "SiLUActivation"}),
    "gemma": (lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=16)), {"GemmaRMSNorm", "GemmaAttention", "GELUTanh"}),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_layer=4, n_embd=64, n_head=4, n_positions=32)),
        {"NewGELUActivation"},
    ),
}


def toy(kind):
    """A model in bfloat16 with weights of some size, so that attention is uneven, and the same one in float32."""
    torch.manual_seed(0)
    low = TOYS[kind][0]().eval()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    low = low.bfloat16()
    full = TOYS[kind][0]().eval()
    full.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    return low, full


@pytest.fixture(scope="module")
def work():
    from saehub_native import extract_loops

    return Work(extract_loops)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).bfloat16()


def once_rounded(found, wanted, float32=1e-6):
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    return bool(((found.double() - wanted).abs() <= 1.01 * ROUNDING * wanted.abs() + float32).all())


@pytest.mark.quick
def test_norms_and_activations_are_float64_rounded_once(work):
    x, weight = 3 * noise(5, 7, 40), noise(40)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert once_rounded(work.normalise(x, weight.float(), 1e-5), wanted)
    x = torch.cat([4 * noise(999), torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38]).bfloat16()])
    for name, function in {
        "SiLU": nn.functional.silu,
        "GELU with tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    }.items():
        assert once_rounded(work.activate(x, *ACTIVATIONS[name]), function(x.double())), name


@pytest.mark.quick
@pytest.mark.parametrize("T, head, turned, heads, groups", [(1, 16, 16, 2, 2), (37, 24, 16, 4, 2), (64, 32, 32, 2, 1), (70, 80, 40, 3, 3)])
def test_attention_is_that_of_float64(work, T, head, turned, heads, groups):
    """Grouped keys, rotations of a part of the channels, lengths and widths that fill no vector."""
    q, k, v = 3 * noise(2, T, heads * head), 2 * noise(2, T, groups * head), noise(2, T, groups * head)
    angle_TR = torch.arange(T)[:, None] * 50.0 ** -torch.linspace(0, 1, turned // 2)
    cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()
    found = work.attend(q, k, v, cos_TR.t().contiguous(), sin_TR.t().contiguous(), head, head**-0.5)

    def split(x_BTD, rotated):
        x_BHTC = x_BTD.double().unflatten(-1, (-1, head)).transpose(1, 2).clone()
        if rotated:
            c, s, half = cos_TR.double(), sin_TR.double(), turned // 2
            a, b = x_BHTC[..., :half].clone(), x_BHTC[..., half:turned].clone()
            x_BHTC[..., :half], x_BHTC[..., half:turned] = a * c - b * s, b * c + a * s
        return x_BHTC.repeat_interleave(heads * head // x_BTD.shape[-1], dim=1)

    scores = split(q, True) @ split(k, True).mT / math.sqrt(head)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    wanted = (scores.softmax(-1) @ split(v, False)).transpose(1, 2).flatten(2)
    assert once_rounded(found, wanted, 1e-5 * float(v.abs().max()))


@pytest.mark.quick
def test_what_is_not_a_number_stays_so(work):
    bad = noise(2, 33, 32)
    bad[1, 20, 3] = math.nan
    table = torch.ones(8, 33), torch.zeros(8, 33)
    for given in ((bad, *(noise(2, 33, 32) for _ in range(2))), (noise(2, 33, 32), bad, noise(2, 33, 32)), (noise(2, 33, 32), noise(2, 33, 32), bad)):
        out = work.attend(*given, *table, 16, 0.25)
        assert out[1, 20, :16].isnan().any() and out[0].isfinite().all() and out[1, :20].isfinite().all()
    assert work.normalise(bad, torch.ones(32), 1e-6)[1, 20].isnan().all()
    assert work.activate(bad, 1.0, 0.0).isnan().sum() == 1 and math.isnan(float(work.activate(torch.full((20,), math.nan).bfloat16(), 1.0, 0.0)[19]))


@pytest.mark.parametrize("kind", TOYS)
def test_rows_are_nearer_to_float32_than_those_of_the_plain_model_in_bfloat16(toys, kind, monkeypatch):
    monkeypatch.setattr(extract, "TOKENS_A_PIECE", 2 * toys.context)
    low, full = toy(kind)
    session, tokens_NT = toys.opened(low)
    assert {type(module).__name__ for module in session._hf.modules() if "forward" in vars(module)} == TOYS[kind][1]
    rows = session.rows(0)
    wanted, rounded = toys.plain(full, tokens_NT[:4]), toys.plain(low, tokens_NT[:4])
    for site in toys.sites:
        x_BTD = rows.acts[site].reshape(wanted[site].shape)
        assert x_BTD.dtype == torch.bfloat16
        assert toys.relative(x_BTD, wanted[site]) < 1.1 * toys.relative(rounded[site], wanted[site]) + ROUNDING < 0.05, site
    for site in toys.sites:  # the same bits beside others as alone
        assert torch.equal(toys.opened(low, [site])[0].rows(0).acts[site], rows.acts[site])


@pytest.mark.quick
def test_the_model_itself_is_left_alone_and_its_parameters_are_shared(toys):
    low, _ = toy("llama")
    inside = []
    handle = low.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: inside.append(1))
    twin = fused(low)
    assert not inside  # hooks see no random inputs
    handle.remove()
    assert not any("forward" in vars(module) for module in low.modules())
    assert all(a is b for a, b in zip(low.parameters(), twin.parameters(), strict=True))
    assert [name for name, _ in low.named_modules()] == [name for name, _ in twin.named_modules()]
    seen = []
    handle = low.model.layers[1].register_forward_hook(lambda *_: seen.append(1))  # hooks of others too
    session, tokens_NT = toys.opened(low)
    before = session.rows(0).acts["resid_post.1"]
    assert seen
    handle.remove()
    with torch.no_grad():
        low.model.layers[0].mlp.down_proj.weight.mul_(2)
        low.model.layers[0].input_layernorm.weight.mul_(0.5)
    after = session.rows(0).acts["resid_post.1"]
    assert not torch.equal(after, before) and toys.relative(after, toys.plain(low, tokens_NT[:4])["resid_post.1"].reshape(after.shape)) < 0.03


class Interleaved(transformers.models.llama.modeling_llama.LlamaAttention):
    """Rotates neighbours instead of halves."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        cos, sin = position_embeddings
        order = torch.arange(cos.shape[-1]).reshape(2, -1).t().flatten()
        return super().forward(hidden_states, (cos[..., order], sin[..., order]), attention_mask, **kwargs)


class ScaledAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """Sharper by a twentieth."""

    def forward(self, hidden_states, *args, **kwargs):
        z, weights = super().forward(hidden_states, *args, **kwargs)
        return z * 1.05, weights


class CentredRMSNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class ClippedSiLU(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x).clamp(max=15)


@pytest.mark.quick
def test_a_module_that_computes_something_else_keeps_its_own_code():
    low, _ = toy("llama")
    for kind in (Interleaved, ScaledAttention):
        low.model.layers[1].self_attn.__class__ = kind
        twin = fused(low)
        assert "forward" in vars(twin.model.layers[0].self_attn) and "forward" not in vars(twin.model.layers[1].self_attn)
    low.model.layers[2].input_layernorm.__class__ = CentredRMSNorm
    low.model.layers[2].mlp.act_fn = ClippedSiLU()
    layers = fused(low).model.layers
    assert "forward" in vars(layers[2].post_attention_layernorm) and "forward" not in vars(layers[2].input_layernorm)
    assert "forward" in vars(layers[1].mlp.act_fn) and "forward" not in vars(layers[2].mlp.act_fn)


@pytest.mark.quick
def test_where_nothing_is_gained_the_model_runs_as_it_is(toys, monkeypatch):
    low, full = toy("llama")
    assert fused(full) is None and toys.opened(full)[0]._hf is full
    low.model.layers[0].mlp.forward = low.model.layers[0].mlp.forward  # somebody else's way of changing a module
    assert fused(low) is None
    del low.model.layers[0].mlp.forward
    low.config.output_hidden_states = True
    assert fused(low) is None
    low.config.output_hidden_states = False
    with monkeypatch.context() as patch:
        patch.setattr(extract_fused, "find_spec", lambda name: None)
        assert fused(low) is None
    with monkeypatch.context() as patch:  # a tree whose modules are not those that run
        patch.setattr(extract_fused, "_twin", lambda module, made: toy("llama")[0].requires_grad_(False).apply(lambda m: None))
        other = toy("llama")[0]
        with torch.no_grad():
            other.model.embed_tokens.weight.add_(1)
        assert toys.opened(other)[0]._hf is other
    assert toys.opened(low)[0]._hf is not low


def test_masks_and_caches_take_the_modules_own_code(toys):
    low, full = toy("llama")
    twin = fused(low)
    tokens_BT = torch.randint(1, 61, (3, 10), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, :4] = 0  # padding on the left
    with torch.no_grad():
        for given in ({"attention_mask": mask_BT}, {"use_cache": True}, {"attn_implementation": "eager"}):
            name = given.pop("attn_implementation", None)
            if name:
                low.config._attn_implementation = full.config._attn_implementation = name
            found, wanted, rounded = (model(tokens_BT, **given).logits.double() for model in (twin, full, low))
            real = mask_BT.bool() if "attention_mask" in given else torch.ones_like(mask_BT).bool()
            assert toys.relative(found[real], wanted[real]) < 1.1 * toys.relative(rounded[real], wanted[real]) + ROUNDING, given


def test_threads_share_the_loops_without_changing_a_bit(work):
    q, k, v = (noise(3, 40, 64) for _ in range(3))
    table = torch.linspace(-1, 1, 8 * 40).reshape(8, 40), torch.linspace(1, -1, 8 * 40).reshape(8, 40)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append([work.attend(q, k, v, *table, 16, 0.25), work.normalise(q, torch.ones(64), 1e-6), work.activate(q, 1.0, 0.0)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert np.isfinite(results[0][0].float().numpy()).all()
