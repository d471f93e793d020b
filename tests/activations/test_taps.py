"""The forward pass behind a reading: where it stops, what it leaves behind, and what it says when something is wrong."""

import copy

import pytest
import torch
from torch import nn

from saehub.activations import taps
from saehub.data.model import shape_of
from saehub.errors import StageFailed, UsageError
from saehub.sites import Site, Tap


def count_calls(model):
    calls = {}
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
        for name, module in model.named_modules()
    ]
    return calls, handles


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bert"])
def test_one_pass_serves_all_sites_and_stops_after_the_deepest(models, kind, tokens_BT):
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    wanted = {name: Site.parse(name).tap(shape) for name in ("resid_post.0", "mlp_act.1", "attn_z.1", "embed")}
    blocks = [Site("resid_post", layer).tap(shape).module for layer in range(3)]
    calls, handles = count_calls(model)
    taps.read(model, tokens_BT, wanted)
    for handle in handles:
        handle.remove()
    assert calls[blocks[0]] == calls[blocks[1]] == 1 and blocks[2] not in calls
    assert not any(name.startswith(("lm_head", "embed_out", "cls")) for name in calls)
    heads = {"llama": "lm_head", "gpt2": "lm_head", "gpt_neox": "embed_out", "bert": "cls"}
    calls, handles = count_calls(model)
    taps.read(model, tokens_BT, wanted, stop=False)
    for handle in handles:
        handle.remove()
    assert calls[blocks[2]] == 1 and not any(
        name.startswith(heads[kind]) for name in calls
    )  # to the end of the base model, never the logits


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_no_cache_no_gradients_and_ordinary_tensors(models, kind, tokens_BT):
    model = models(kind)
    shape = shape_of(model.config.to_dict())
    seen = []
    block = taps.resolve(model, Site("resid_post", 0).tap(shape).module)

    def look(module, args, kwargs):
        seen.append(
            (
                torch.is_inference_mode_enabled(),
                [value for name, value in kwargs.items() if "past" in name] + [a for a in args if "Cache" in type(a).__name__],
            )
        )

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    x = taps.read(model, tokens_BT, {0: Site("resid_post", 1).tap(shape)})[0]
    handle.remove()
    ((inference, caches),) = seen
    assert inference and all(cache is None for cache in caches)
    assert not x.requires_grad and not x.is_inference()
    weight = torch.ones(x.shape[-1], requires_grad=True)
    (x * weight).sum().backward()  # ordinary: a trainer may use it


@pytest.mark.quick
def test_nothing_is_left_behind_not_even_after_an_error(models, tokens_BT):
    model = models("llama")
    shape = shape_of(model.config.to_dict())
    tap = Site("resid_post", 1).tap(shape)
    before = copy.deepcopy(model.state_dict())
    settings = model.config.to_dict()
    clean = hooks_of(model)
    model.train()
    taps.read(model, tokens_BT, {0: tap})
    assert model.training
    model.eval()
    taps.splice(model, tokens_BT, tap, lambda x: x * 2)
    for attempt in (
        lambda: taps.read(model, torch.full((1, 4), 10_000), {0: tap}),  # an id outside the vocabulary
        lambda: taps.splice(model, tokens_BT, tap, lambda x: 1 / 0),
        lambda: taps.splice(model, tokens_BT, tap, lambda x: x[..., :3]),
        lambda: taps.read(model, tokens_BT, {0: tap, 1: Tap("model.layers.7", "out")}),
    ):
        with pytest.raises((IndexError, RuntimeError, ZeroDivisionError, StageFailed, UsageError)):
            attempt()
        assert hooks_of(model) == clean
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert model.config.to_dict() == settings
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.quick
def test_readings_are_copies_that_later_layers_cannot_change():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            x += 1
            return self.second(x)

    model = InPlace()
    x = torch.randn(2, 3, 4)
    got = taps.read(model, x, {"first": Tap("first", "out"), "second": Tap("second", "in")})
    with torch.no_grad():
        want = model.first(x)
    assert torch.equal(got["first"], want) and torch.equal(got["second"], want + 1)


@pytest.mark.quick
def test_paths_are_found_from_the_model_its_base_and_without_the_prefix(models):
    model = models("llama")
    layer = model.model.layers[1]
    assert taps.resolve(model, "model.layers.1") is taps.resolve(model, "layers.1") is taps.resolve(model.model, "model.layers.1") is layer

    class Text(nn.Module):  # multimodal models keep the text model one level down
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.language_model = model.model

        @property
        def base_model(self):
            return self.model

    assert taps.resolve(Text(), "model.layers.1") is layer
    with pytest.raises(UsageError, match="did you mean 'model.layers.1.mlp'"):
        taps.resolve(model, "model.layers.1.mpl")


@pytest.mark.quick
def test_modules_that_do_not_run_or_hold_no_tensor(models, tokens_BT):
    model = models("bert")
    with pytest.raises(StageFailed, match="never reached"):
        taps.read(model.bert, tokens_BT, {0: Tap("encoder.layer.0", "out"), 1: Tap("encoder.layer", "out")})
    with pytest.raises(UsageError, match="no language-modelling head"):
        taps.logits(model.bert, tokens_BT)
