"""A loaded Hugging Face model in; the same model as nnsight sees it out, for as long as a `with` block lasts, without a trace left on it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saehub.activations import taps
from saehub.capabilities import Library
from saehub.errors import UsageError
from saehub.sites import Site, Tap

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle

NNSIGHT = Library("nnsight", "nnsight", written_for="0.3.7")
PAD = "<|saehub-pad|>"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


class Traced:
    """nnsight's `LanguageModel` around the module that is loaded already: from a path, 0.3.7 fails on Llama under transformers 5 (KeyError 'factor').

    nnsight wants a padding token even where nothing is padded; a tokenizer without one gets one, in a copy, that no text contains. So no
    token is left out of the library's cross-entropy, which ignores the padding id.
    """

    def __init__(self, handle: ModelHandle):
        self.handle = handle

    def __enter__(self) -> Traced:
        make = NNSIGHT.take("nnsight:LanguageModel", attributes=["trace"])
        tokenizer = copy.deepcopy(self.handle.tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        self._hooks = {module: {name: OrderedDict(getattr(module, name)) for name in HOOKS} for module in self.handle.hf.modules()}
        self._children = {module: dict(module._modules) for module in self._hooks}
        self._mode = self.handle.hf.training
        self._gradients = torch.is_grad_enabled()
        self.model = make(self.handle.hf, tokenizer=tokenizer)
        return self

    def __exit__(self, *exception: object) -> None:
        for module, hooks in self._hooks.items():  # nnsight 0.3.7 never takes its own hooks away (envoy.py)
            for name, before in hooks.items():
                held = getattr(module, name)
                held.clear()
                held.update(before)
        for module, before in self._children.items():  # and it hangs modules of its own, with hooks, on the model
            for name in set(module._modules) - set(before):
                del module._modules[name]
        self.handle.hf.train(self._mode)
        torch.set_grad_enabled(self._gradients)

    def module(self, site: str) -> tuple[Any, str]:
        """nnsight's envoy of a site's module, and its side: `in` or `out`."""
        tap = Site.parse(site).tap(self.handle.shape)
        return self._envoy(tap), tap.io

    def _envoy(self, tap: Tap) -> Any:
        wanted = taps.resolve(self.handle.hf, tap.module)
        path = next(name for name, module in self.handle.hf.named_modules() if module is wanted)
        envoy = self.model
        for part in path.split("."):
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        return envoy

    def read(self, tokens_BT: Tensor, sites: Mapping[str, str]) -> dict[str, Tensor]:
        """name -> [batch, positions, d] at the sites, from one trace of the whole model; copies, without gradients."""
        saved = {}
        envoys = {name: self.module(site) for name, site in sites.items()}
        device = next(self.handle.hf.parameters()).device
        with torch.no_grad(), self.model.trace(tokens_BT.to(device), use_cache=False):
            for name, (envoy, io) in envoys.items():
                saved[name] = (envoy.input if io == "in" else envoy.output).save()
        return {name: _tensor(name, proxy.value) for name, proxy in saved.items()}


def _tensor(name: str, value: Any) -> Tensor:
    """The tensor that a module took or gave, the first of a tuple."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise UsageError(f"{name} holds no tensor: nnsight gives a {type(value).__name__}", fix="tap a module inside it")
    return value.detach().clone()


