"""A Sparsify `Trainer` at rest between two steps in; tensors and plain data that hold its whole state out, and back, bit for bit.

Not the library's `save` and `load_state`: they average and un-average a schedule-free optimizer's weights on the way (trainer.py:676-713), leave
the wrapper in the wrong mode after loading, and store a step count that is one too small (trainer.py:578 before :627), so that the last batch is
trained on twice. Here weights are kept as the optimizer has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def capture(trainer: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of the one SAE `name` of `trainer`: parameters, the optimizers' moments, rows since each latent fired; and counters, rates, k."""
    coder = trainer.saes[name]
    tensors = {f"coder.{key}": value.detach().clone() for key, value in coder.state_dict().items()}
    tensors["since_fired"] = trainer.num_tokens_since_fired[name].clone()
    scalars: dict[str, dict[str, Any]] = {}
    for key, state in _moments(trainer, coder):
        tensors |= {f"{key}.{word}": value.clone() for word, value in state.items() if isinstance(value, Tensor)}
        scalars[key] = {word: value for word, value in state.items() if not isinstance(value, Tensor)}
    groups = [[{word: value for word, value in group.items() if word != "params"} for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    return tensors, {
        "step": trainer.global_step,
        "k": coder.cfg.k,
        "scalars": {key: values for key, values in scalars.items() if values},
        "groups": groups,
        "schedulers": [scheduler.state_dict() for scheduler in trainer.lr_schedulers],
    }


@torch.no_grad()
def restore(trainer: Any, name: str, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Put back what `capture` returned; `k` is set by whoever starts fit(), which overwrites it (trainer.py:488)."""
    coder = trainer.saes[name]
    for key, value in coder.state_dict().items():
        value.copy_(tensors[f"coder.{key}"])
    trainer.num_tokens_since_fired[name].copy_(tensors["since_fired"])
    trainer.global_step = data["step"]
    parameters = {id(parameter): key for key, parameter in coder.named_parameters()}
    for number, (optimizer, groups) in enumerate(zip(trainer.optimizers, data["groups"], strict=True)):
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({word: tuple(value) if isinstance(group.get(word), tuple) else value for word, value in saved.items()})
            for parameter in group["params"]:
                key = f"optimizer{number}.{parameters[id(parameter)]}"
                state = dict(data["scalars"].get(key, {}))
                for word in (full for full in tensors if full.rpartition(".")[0] == key):
                    value = tensors[word].clone()
                    state[word.rpartition(".")[2]] = value if value.dim() == 0 else value.to(parameter.device)  # Adam counts steps on the CPU
                if state:
                    optimizer.state[parameter] = state
                else:
                    optimizer.state.pop(parameter, None)
    for scheduler, saved in zip(trainer.lr_schedulers, data["schedulers"], strict=True):
        scheduler.load_state_dict(dict(saved))


def _moments(trainer: Any, coder: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`optimizer0.W_dec`, its state): by name, because Muon's groups are Python sets, whose order differs between runs."""
    parameters = {id(parameter): key for key, parameter in coder.named_parameters()}
    for number, optimizer in enumerate(trainer.optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    yield f"optimizer{number}.{parameters[id(parameter)]}", optimizer.state[parameter]


@torch.no_grad()
def trained(trainer: Any, name: str) -> dict[str, Tensor]:
    """The SAE's tensors as the library would save them (a schedule-free optimizer's average, trainer.py:674); the trainer stays as it is."""
    coder = trainer.saes[name]
    before = {key: value.detach().clone() for key, value in coder.state_dict().items()}
    averaging = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "train_mode")]
    modes = [optimizer.train_mode for optimizer in averaging]
    for optimizer in averaging:
        optimizer.eval()
    found = {key: value.detach().clone() for key, value in coder.state_dict().items()}
    for optimizer, mode in zip(averaging, modes, strict=True):
        optimizer.train_mode = mode  # not train(): going back by the formula would round
    for key, value in coder.state_dict().items():
        value.copy_(before[key])
    return found
