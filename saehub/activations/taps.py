"""A Hugging Face model, token ids and taps in; the tensors at those taps from one truncated forward pass, or logits under an intervention, out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saehub.errors import StageFailed, UsageError, did_you_mean
from saehub.sites import Tap

Key = TypeVar("Key", bound=Hashable)


class _Stop(Exception):
    """Every tap has been read: leave the forward pass."""


def resolve(model_hf: nn.Module, path: str) -> nn.Module:
    """The module at `path`, written from the language model, from its base model, or with the prefix of a model class that was not loaded.

    UsageError that names the nearest module when there is none.
    """
    base = _base(model_hf)
    prefix = getattr(model_hf, "base_model_prefix", "") or ""
    head, _, tail = path.partition(".")
    # `AutoModel` gives the base model alone; multimodal models keep the text model one level down.
    for root, name in (
        (model_hf, path),
        (base, path),
        (base, tail if head == prefix else ""),
        (base, f"language_model.{tail if head == prefix else path}"),
    ):
        if name:
            try:
                return root.get_submodule(name)
            except AttributeError:
                continue
    known = [name for name, _ in model_hf.named_modules() if name]
    raise UsageError(
        f"the model has no module {path!r}{did_you_mean(path, known)}",
        why=f"it is a {type(model_hf).__name__} with {len(known)} modules",
        fix="list them with `for name, _ in model.named_modules()`",
    )


def _base(model_hf: nn.Module) -> nn.Module:
    base = getattr(model_hf, "base_model", None)
    return base if isinstance(base, nn.Module) else model_hf


def _first(value: Any) -> Tensor | None:
    """The tensor in a module's output: itself, the first of a tuple (as layers returned before transformers 5), or a model output's first field."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def _input(args: tuple, kwargs: dict) -> Tensor | None:
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next((value for value in (kwargs.get("hidden_states"), *kwargs.values()) if isinstance(value, Tensor)), None)


def _forward(module: nn.Module, tokens_BT: Tensor) -> Any:
    """One call without a key-value cache; the switch is given only to models that know it (encoders do not)."""
    accepted = inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepted else {}
    return module(input_ids=tokens_BT, **extra) if "input_ids" in accepted else module(tokens_BT)


def _device(model_hf: nn.Module) -> torch.device:
    return next(model_hf.parameters()).device


def read(model_hf: nn.Module, tokens_BT: Tensor, taps: Mapping[Key, Tap], *, stop: bool = True) -> dict[Key, Tensor]:
    """The tensors at `taps`, from one forward pass of the base model (no logits, no gradients, no cache) that ends after the last of them.

    Args:
        model_hf: any module called with token ids; its hooks, mode and parameters are as before when this returns or raises.
        tokens_BT: int64 [batch, positions], moved to the model's device.
        taps: name -> where; two names may share a tap.
        stop: False runs the base model to its end.

    Returns: name -> [batch, positions, d] in the model's dtype, copies that no later operation of the model can change.
    Raises: UsageError for a module that does not exist; StageFailed for one that did not run or holds no tensor.
    """
    places: dict[tuple[nn.Module, str], list[Key]] = {}
    for key, tap in taps.items():
        places.setdefault((resolve(model_hf, tap.module), tap.io), []).append(key)
    found: dict[Key, Tensor] = {}
    waiting = set(places)

    thread = get_ident()

    def take(place: tuple[nn.Module, str], tensor: Tensor | None) -> None:
        if place not in waiting or get_ident() != thread:
            return  # a module that runs twice: the first time counts; another thread's pass through the same model is not ours
        if tensor is None:
            raise StageFailed(
                f"no activation tensor at {taps[places[place][0]]}",
                why="the module's first input or output is not a tensor",
                fix="tap a module inside it",
            )
        with torch.inference_mode(False):  # an ordinary tensor, so that callers may use it with gradients
            copy = tensor.detach().clone()
        for key in places[place]:
            found[key] = copy
        waiting.discard(place)
        if stop and not waiting:
            raise _Stop

    handles = []
    try:
        for place in places:
            module, io = place
            if io == "in":
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs, place=place: take(place, _input(args, kwargs)), with_kwargs=True
                    )
                )
            else:
                handles.append(module.register_forward_hook(lambda _m, _args, output, place=place: take(place, _first(output))))
        base = _base(model_hf)
        inside = set(base.modules())
        root = base if all(module in inside for module, _ in places) else model_hf
        with torch.inference_mode():
            try:
                _forward(root, tokens_BT.to(_device(model_hf)))
            except _Stop:
                pass
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        names = ", ".join(sorted(str(taps[places[place][0]]) for place in waiting))
        raise StageFailed(f"the forward pass never reached {names}", fix="choose a site that runs on every token")
    return {key: found[key] for key in taps}


def logits(model_hf: nn.Module, tokens_BT: Tensor) -> Tensor:
    """[batch, positions, vocab] of the unchanged model, without gradients; UsageError for a model without a language-modelling head."""
    with torch.no_grad():
        output = _forward(model_hf, tokens_BT.to(_device(model_hf)))
    scores = getattr(output, "logits", None)
    if scores is None:
        raise UsageError(
            f"{type(model_hf).__name__} has no language-modelling head",
            why="its output holds no logits",
            fix="load a causal or masked language model",
        )
    return scores


def splice(model_hf: nn.Module, tokens_BT: Tensor, tap: Tap, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [batch, positions, vocab] of the model with the tensor x_BTD at `tap` replaced by `fn(x_BTD)`, without gradients.

    At a `shared` tap (resid_mid) the block adds the same tensor again later, so it is changed in place: both uses see the new one.
    `fn` gets a copy, may return another dtype, and must keep the shape.
    """
    module = resolve(model_hf, tap.module)

    def change(x_BTD: Tensor | None) -> Tensor:
        if x_BTD is None:
            raise StageFailed(f"no activation tensor at {tap}", fix="choose a module whose first input or output is one")
        new_BTD = fn(x_BTD.clone())
        if new_BTD.shape != x_BTD.shape:
            raise StageFailed(f"an intervention at {tap} changed the shape", why=f"{list(x_BTD.shape)} became {list(new_BTD.shape)}")
        new_BTD = new_BTD.to(x_BTD.dtype)
        return x_BTD.copy_(new_BTD) if tap.shared else new_BTD

    thread = get_ident()

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if get_ident() != thread:
            return None  # another thread's pass through the same model
        x_BTD = _input(args, kwargs)
        new_BTD = change(x_BTD)
        return tuple(new_BTD if value is x_BTD else value for value in args), {
            name: new_BTD if value is x_BTD else value for name, value in kwargs.items()
        }

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if get_ident() != thread:
            return None
        x_BTD = _first(output)
        new_BTD = change(x_BTD)
        if isinstance(output, Tensor):
            return new_BTD
        if isinstance(output, Mapping):
            changed = dict(output)
            changed[next(iter(changed))] = new_BTD
            return type(output)(**changed)
        return type(output)((new_BTD, *output[1:]))

    handle = module.register_forward_pre_hook(before, with_kwargs=True) if tap.io == "in" else module.register_forward_hook(after)
    try:
        return logits(model_hf, tokens_BT)
    finally:
        handle.remove()
