"""A Hugging Face model, token ids and taps in; the tensors at those taps from one truncated forward pass, or logits under an intervention, out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, get_ident
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


def read(
    model_hf: nn.Module,
    tokens_BT: Tensor,
    taps: Mapping[Key, Tap],
    *,
    stop: bool = True,
    split: int | None = None,
    run: Callable[[Callable[[int], object], int], object] | None = None,
) -> dict[Key, Tensor]:
    """The tensors at `taps`, from one forward pass of the base model (no logits, no gradients, no cache) that ends after the last of them.

    Args:
        model_hf: any module called with token ids; its hooks, mode and parameters are as before when this returns or raises.
        tokens_BT: int64 [batch, positions], moved to the model's device.
        taps: name -> where; two names may share a tap.
        stop: False runs the base model to its end.
        split: sequences a forward pass; None: all in one.
        run: `run(piece, n)` calls `piece(0)` … `piece(n - 1)`, one a forward pass, on any threads; None: one after the other.

    Returns: name -> [batch, positions, d] in the model's dtype, copies that no later operation of the model can change.
    Raises: UsageError for a module that does not exist; StageFailed for one that did not run or holds no tensor.
    """
    places: dict[tuple[nn.Module, str], list[Key]] = {}
    for key, tap in taps.items():
        places.setdefault((resolve(model_hf, tap.module), tap.io), []).append(key)
    found = _Found(len(tokens_BT), split or len(tokens_BT), {place: taps[keys[0]] for place, keys in places.items()}, stop)
    handles = []
    try:
        for place in places:
            module, io = place
            if io == "in":
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs, place=place: found.take(place, _input(args, kwargs)), with_kwargs=True
                    )
                )
            else:
                handles.append(module.register_forward_hook(lambda _m, _args, output, place=place: found.take(place, _first(output))))
        base = _base(model_hf)
        inside = set(base.modules())
        root = base if all(module in inside for module, _ in places) else model_hf
        tokens_BT = tokens_BT.to(_device(model_hf))

        def piece(number: int) -> None:
            with found.of(number) as mine, torch.inference_mode():
                _forward(root, tokens_BT[mine])

        if run is None or found.pieces <= 1:
            for number in range(found.pieces):
                piece(number)
        else:
            run(piece, found.pieces)
    finally:
        for handle in handles:
            handle.remove()
    of_key = {key: place for place, keys in places.items() for key in keys}
    return {key: found.tensors[of_key[key]] for key in taps}


class _Found:
    """What the hooks of one reading have seen: the whole batch's tensor of each place, which the forward passes fill in piece by piece."""

    def __init__(self, sequences: int, split: int, places: Mapping[tuple[nn.Module, str], Tap], stop: bool):
        self.sequences, self.split, self.places, self.stop = sequences, split, places, stop
        self.pieces = max(1, -(-sequences // split)) if split else 1
        self.tensors: dict[tuple[nn.Module, str], Tensor] = {}
        self._lock = Lock()
        self._now: dict[int, tuple[slice, set[tuple[nn.Module, str]]]] = {}  # thread -> its sequences, and the places it waits for

    @contextmanager
    def of(self, number: int) -> Iterator[slice]:
        """The sequences of a piece, which this thread now runs; StageFailed where it leaves a place unseen."""
        mine = slice(number * self.split, min((number + 1) * self.split, self.sequences))
        waiting = set(self.places)
        self._now[get_ident()] = mine, waiting
        try:
            try:
                yield mine
            except _Stop:
                pass
        finally:
            del self._now[get_ident()]
        if waiting:
            names = ", ".join(sorted(str(self.places[place]) for place in waiting))
            raise StageFailed(f"the forward pass never reached {names}", fix="choose a site that runs on every token")

    def take(self, place: tuple[nn.Module, str], tensor: Tensor | None) -> None:
        mine, waiting = self._now.get(get_ident(), (None, ()))
        if place not in waiting:
            return  # a module that runs twice: the first time counts; another thread's pass through the same model is not ours
        if tensor is None:
            raise StageFailed(
                f"no activation tensor at {self.places[place]}",
                why="the module's first input or output is not a tensor",
                fix="tap a module inside it",
            )
        with torch.inference_mode(False):  # an ordinary tensor, so that callers may use it with gradients
            if self.pieces == 1:
                self.tensors[place] = tensor.detach().clone()
            else:
                self._whole(place, tensor, mine)[mine].copy_(tensor.detach())
        waiting.discard(place)
        if self.stop and not waiting:
            raise _Stop

    def _whole(self, place: tuple[nn.Module, str], tensor: Tensor, mine: slice) -> Tensor:
        """The whole batch's tensor, made when its first piece comes."""
        with self._lock:
            whole = self.tensors.get(place)
            if whole is None:
                whole = torch.empty((self.sequences, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
                self.tensors[place] = whole
        if tensor.shape[:1] != (mine.stop - mine.start,) or tensor.shape[1:] != whole.shape[1:]:
            raise StageFailed(
                f"{self.places[place]} does not hold one row a sequence",
                why=f"{mine.stop - mine.start} sequences give a tensor of shape {list(tensor.shape)}",
                fix="choose a module whose input or output is [batch, positions, width]",
            )
        return whole


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
