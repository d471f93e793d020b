"""Forward passes that no SAE enters in; each computed once and handed to every SAE of a run, one batch in memory at a time or from files, out.

SAEBench evaluates one SAE from beginning to end, then the next, and runs the unchanged and the ablated model again for each. Here every
SAE's evaluation is a thread; exactly one runs at a time, and none goes on to a batch before all have arrived there. So SAEBench's code
stays as it is, a batch's logits are shared and dropped when the last SAE is done with them, and every number is bit-identical.

Evals that read activations alone, batch after batch and several times (absorption, autointerp, unlearning), find them in files instead.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saehub.jsonio import hash_json, sha256_tensor


class Lockstep:
    """The turn of several SAEs, and what they share at the position where they are."""

    def __init__(self, everyone: list[str]):
        self._turn = threading.Condition()
        self._at: dict[str, tuple[int, ...]] = {name: (-1,) for name in everyone}
        self._shared: dict[tuple, Any] = {}

    def get(self, who: str, position: tuple[int, ...], key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()` of whoever comes first at (position, key); waits until all SAEs have come to `position`."""
        if position != self._at[who]:
            self._at[who] = position
            self._turn.notify_all()
            self._turn.wait_for(lambda: min(self._at.values()) >= position)
            self._shared = {at: value for at, value in self._shared.items() if at[0] >= position}
        if (position, key) not in self._shared:
            self._shared[position, key] = compute()
        return self._shared[position, key]

    def run(self, tasks: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Every task's result, or the exception that it raised; the tasks call `get` under their name."""
        results: dict[str, Any] = {}

        def work(name: str) -> None:
            with self._turn:
                try:
                    results[name] = tasks[name]()
                except BaseException as error:  # handed to the caller, whose thread it belongs to
                    results[name] = error
                finally:
                    del self._at[name]  # the others need not wait for it
                    self._turn.notify_all()

        threads = [threading.Thread(target=work, args=(name,), name=f"saebench {name}") for name in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class SharedModel:
    """The model as one SAE sees it: clean and zero-ablated passes and the site's activations come from `lockstep`."""

    def __init__(self, model: Any, who: str, lockstep: Lockstep | None):
        self.model, self.who, self.lockstep = model, who, lockstep
        self.stage = self.batch = 0
        self.clean: tuple[Tensor, Tensor] | None = None
        """Logits and loss of the batch at hand."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def next_batch(self) -> None:
        """The store has given the next batch of tokens."""
        self.batch += 1

    def next_stage(self) -> None:
        """The store begins again."""
        self.stage, self.batch = self.stage + 1, 0

    def _get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        return compute() if self.lockstep is None else self.lockstep.get(self.who, (self.stage, self.batch), key, compute)

    def __call__(self, tokens: Tensor, **options: Any) -> Any:
        self.clean = self._get("clean", partial(self.model, tokens, **options))
        return self.clean

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = (), **options: Any) -> Any:
        """Zero-ablation is shared; anything else holds the SAE."""
        run = partial(self.model.run_with_hooks, tokens, fwd_hooks=fwd_hooks, **options)
        ((name, hook),) = fwd_hooks
        if getattr(hook, "__name__", "") == "standard_zero_ablate_hook":
            return self._get(("zero", name), run)
        return run()

    def run_with_cache(self, tokens: Tensor, names_filter: Any = None, **options: Any) -> Any:
        """The activations of a site."""
        names = tuple(names_filter) if isinstance(names_filter, list) else names_filter
        return self._get(("cache", names), partial(self.model.run_with_cache, tokens, names_filter=names_filter, **options))


class Remembered:
    """The model, whose activations are computed once for each batch of tokens and read back, bit for bit, for every further SAE, pass and seed."""

    def __init__(self, model: Any, folder: Path):
        self.model, self.folder = model, folder
        self.computed = 0
        """Forward passes made."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options)

    def run_with_cache(self, tokens: Tensor | list[str], names_filter: Any = None, **options: Any) -> tuple[None, dict[str, Tensor]]:
        """No logits, and the tensors at the sites asked for, by name."""
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        batch = sha256_tensor(tokens.cpu()) if isinstance(tokens, Tensor) else list(tokens)
        file = self.folder / f"{hash_json([batch, names, sorted(map(str, options.items()))])[:32]}.safetensors"
        if file.exists():  # in memory of torch's own, as when they were computed: some sums depend on where in a cache line a tensor begins
            return None, {name: tensor.clone() for name, tensor in load_file(file, device=str(self.model.cfg.device)).items()}
        self.computed += 1
        found = self.model.run_with_cache(tokens, names_filter=names_filter, **options)[1]
        kept = {name: found[name].detach().clone(memory_format=torch.contiguous_format) for name in names}
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free > 8 * sum(tensor.nbytes for tensor in kept.values()) + 2**30:
            part = file.with_suffix(".part")
            save_file(kept, part)
            part.replace(file)
        return None, kept
