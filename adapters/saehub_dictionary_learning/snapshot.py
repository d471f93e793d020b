"""A trainer of the library in; its whole state as tensors and plain data out, and back, so that training goes on bit for bit (the library has no resume)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saehub.errors import FormatError, StageFailed

SAVED_APART = ("ae", "optimizer", "scheduler")
PLAIN = (bool, int, float, str, type(None))


def attributes(trainer: Any) -> dict[str, Any]:
    """What a trainer keeps beside its dictionary, optimizer and schedule: counters, p, queues. Functions are made anew by its constructor."""
    return {name: value for name, value in vars(trainer).items() if not name.startswith("_") and name not in SAVED_APART and not callable(value)}


def take(trainer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of everything that `put` needs; StageFailed for an attribute that is neither tensor nor plain data."""
    tensors = {f"ae.{name}": value for name, value in trainer.ae.state_dict().items()}
    plain: dict[str, Any] = {}
    for name, value in attributes(trainer).items():
        if isinstance(value, Tensor):
            tensors[f"own.{name}"] = value
        elif _is_plain(value):
            plain[name] = value
        else:
            raise StageFailed(
                f"{type(trainer).__name__}.{name} is a {type(value).__name__}, which saehub cannot save",
                why="this version of dictionary_learning keeps a kind of state that the adapter does not know",
                fix="pip install 'dictionary-learning==0.1.0'",
            )
    optimizer = trainer.optimizer.state_dict()
    for number, entry in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    groups = [{name: list(value) if isinstance(value, tuple) else value for name, value in group.items()} for group in optimizer["param_groups"]]
    data = {"own": plain, "groups": groups, "scheduler": trainer.scheduler.state_dict()}
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}, data


def put(trainer: Any, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Into a trainer that was made with the same settings; FormatError if the state is of another one."""
    device = torch.device(str(trainer.device))
    dictionary = {name.removeprefix("ae."): value for name, value in tensors.items() if name.startswith("ae.")}
    known = {name: value.shape for name, value in trainer.ae.state_dict().items()}
    if {name: value.shape for name, value in dictionary.items()} != known:
        raise FormatError("the saved state does not fit this trainer's settings", why=f"its dictionary has {sorted(dictionary)}")
    trainer.ae.load_state_dict(dictionary)
    for name, value in data["own"].items():
        setattr(trainer, name, value)
    for name, value in tensors.items():
        if name.startswith("own."):
            own = name.removeprefix("own.")
            made = getattr(trainer, own, None)  # schedules of p stay on the CPU
            setattr(trainer, own, value.clone().to(made.device if isinstance(made, Tensor) else device))
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, entry = name.split(".", 2)
            state.setdefault(int(number), {})[entry] = _laid_out_as(parameters[int(number)], value)
    groups = [{name: tuple(value) if name == "betas" else value for name, value in group.items()} for group in data["groups"]]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.scheduler.load_state_dict(dict(data["scheduler"]))


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Adam's moments with the strides of their parameter, as Adam makes them: another layout can round differently."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(_is_plain(item) for item in value))
