"""Batches of rows in, an SAE trained by Sparsify's own `Trainer` out; runs in the plugin's worker, and can stop and go on between any two steps."""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from saehub.errors import StageFailed, UsageError
from saehub_sparsify import library
from saehub_sparsify.replay import SITE, Batches, Gate, ReplayModel
from saehub_sparsify.state import capture, restore, trained

if TYPE_CHECKING:
    from saehub.api import Calibration, Job
    from saehub.checkpoint.sae import SAE
    from saehub_sparsify.config import SparsifyConfig


class SparsifyTrainer:
    """Implements `saehub.api.Trainer` for every config of `saehub_sparsify.config`."""

    def __init__(self, config: SparsifyConfig):
        self.config = config

    def open(self, job: Job, calibration: Calibration) -> SparsifySession:
        """One SAE, drawn from `job.seed` as the library draws it. Raises UsageError for settings that do not fit the job.

        Calibration rows are not used: the library centres its biases on the first batch, and its loss has no scale.
        """
        problems = list(self.config.check(job))
        if problems:
            raise UsageError(f"{job.id} cannot be trained: " + "; ".join(problems), where=f"train {job.id}", fix="saehub recipe check")
        return SparsifySession(self.config, job)


class SparsifySession:
    """Implements `saehub.api.TrainerSession`: one upstream Trainer over one hookpoint and one seed, whose fit() is pushed."""

    def __init__(self, config: SparsifyConfig, job: Job):
        self.config, self.job = config, job
        self.model = ReplayModel(job.d_in, job.device)
        self.trainer = make_trainer(config, job, [SITE], Batches(job.steps, config.batch), self.model, batch_size=1)
        self.drive = Drive(self.trainer, SITE, config, job)

    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        """One optimizer step on float32 rows. Raises StageFailed at a loss that is not finite."""
        job = self.job
        rows = self._rows(x_BD, "rows"), self._rows(y_BD, "targets") if job.target_site is not None else None
        if self.trainer.global_step >= job.steps:
            raise StageFailed(f"{job.id} has taken all of its {job.steps} steps", where=f"train {job.id}")
        self.model.rows = rows
        self.drive.advance()

    def _rows(self, rows: Tensor | None, what: str) -> Tensor:
        expected = (self.config.batch, self.job.d_in)
        if rows is None or tuple(rows.shape) != expected:
            seen = "none" if rows is None else list(rows.shape)
            raise StageFailed(f"{what} of {self.job.id}: {seen}", where=f"train {self.job.id}", why=f"{list(expected)} was expected")
        return rows.detach().to(self.job.device, torch.float32)

    def metrics(self) -> dict[str, float]:
        """Of the last step: `loss`, `fvu`, `l0`, `dead` (share), `lr`, and `auxk`, `multi_topk_fvu` where they are trained on."""
        return self.drive.metrics()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that goes on bit-identically, also for signum."""
        return self.drive.state()

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Continue from what `state` returned."""
        self.drive.load_state(tensors, data)

    def cautions(self) -> list[str]:
        """What is known only where it ran."""
        return cuda_caution(self.job)

    def finish(self) -> SAE:
        """The SAE as the library would save it, with the cfg.json that it would write as its origin."""
        return self.drive.finish()


class Drive:
    """Advances an upstream Trainer step by step, and reads and replaces its state in between."""

    def __init__(self, trainer: Any, name: str, config: SparsifyConfig, job: Job):
        self.trainer, self.name, self.config, self.job = trainer, name, config, job
        self.watch = Watch(trainer, trainer.saes[name], config)
        self.gate = Gate(trainer.fit, job.device)
        self._end = weakref.finalize(self, self.gate.stop)

    def advance(self) -> None:
        """One step of fit()."""
        with surroundings(self.job.device, draws=not self.gate.running):  # a DataLoader draws a seed when fit() begins
            torch.set_float32_matmul_precision("high")  # as fit() sets it, once, for a whole process
            self.gate.advance()
        if self.watch.last and not math.isfinite(float(self.watch.last["fvu"])):
            raise StageFailed(
                f"the loss of {self.job.id} is {float(self.watch.last['fvu'])} at step {self.trainer.global_step} of {self.job.steps}",
                where=f"train {self.job.id}",
                why="the learning rate is too high, or the rows hold extreme values",
                fix="a lower lr in the recipe's `with:`; what was saved before stays valid",
            )

    def metrics(self) -> dict[str, float]:
        """Of the last step."""
        found = {name: float(value) for name, value in self.watch.last.items()}
        if found:
            dead = self.trainer.num_tokens_since_fired[self.name] > self.config.dead_after
            found["dead"] = float(dead.float().mean())
        return found

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON-able data; refuses to save what is not finite."""
        tensors, data = capture(self.trainer, self.name)
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            raise StageFailed(f"{broken[0]} of {self.job.id} is not finite after step {data['step']}", where=f"train {self.job.id}", fix="a lower lr")
        return tensors, data

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """End fit() where it waits, and let the next step start one that goes on from there."""
        self.gate.stop()
        restore(self.trainer, self.name, tensors, data)
        self.watch.k = data["k"]

    def finish(self) -> SAE:
        """The trained SAE, float32 on the CPU."""
        from saehub.checkpoint.foreign import Foreign
        from saehub_sparsify.mapping import from_sparsify

        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in trained(self.trainer, self.name).items()}
        coder = self.trainer.saes[self.name]
        # k as it was asked for: while it decays, the library would store the transient one (sparse_coder.py:171).
        return from_sparsify(Foreign({**coder.cfg.to_dict(), "k": self.config.k, "d_in": coder.d_in}, tensors))


class Watch:
    """Sees what the SAE computes in a step, by hooks that change nothing."""

    def __init__(self, trainer: Any, coder: torch.nn.Module, config: SparsifyConfig):
        self.last: dict[str, Tensor | float] = {}
        self.k: int | None = None
        """Set to make the first step after a restart use this k: fit() starts with that of a step later (trainer.py:593 before :627, then :488)."""
        self._rate = trainer.optimizers[0].param_groups[0]
        self._config = config
        self._chunks = 0
        coder.register_forward_pre_hook(self._before)
        coder.register_forward_hook(self._after)

    def _before(self, coder: Any, _inputs: Any) -> None:
        if self.k is not None:
            coder.cfg.k, self.k = self.k, None

    @torch.no_grad()
    def _after(self, coder: Any, _inputs: Any, out: Any) -> None:
        """Means over the chunks of a step. With multi_topk the 4k largest are returned; those that count at inference are k of them."""
        config = self._config
        l0 = (out.latent_acts.detach() > 0).sum(-1).clamp(max=coder.cfg.k).float().mean()
        now = {"fvu": out.fvu.detach().float() * config.micro_acc_steps, "l0": l0}
        if config.auxk_alpha > 0:
            now["auxk"] = out.auxk_loss.detach().float() * config.micro_acc_steps
        if config.multi:
            now["multi_topk_fvu"] = out.multi_topk_fvu.detach().float() * config.micro_acc_steps
        if self._chunks == 0:
            self.last = dict.fromkeys(now, 0.0)
        self._chunks = (self._chunks + 1) % config.micro_acc_steps
        for name, value in now.items():
            self.last[name] = self.last[name] + value / config.micro_acc_steps
        self.last["loss"] = self.last["fvu"] + config.auxk_alpha * self.last.get("auxk", 0.0) + self.last.get("multi_topk_fvu", 0.0) / 8
        self.last["lr"] = float(self._rate["lr"])


def make_trainer(config: SparsifyConfig, job: Job, hookpoints: list[str], dataset: Any, model: Any, *, batch_size: int, **more: Any) -> Any:
    """The library's Trainer for one job, weights drawn from `job.seed` (or read from `job.init_from`); global random states stay as they are."""
    parts = library.training()
    coder = parts.coder_config(
        activation=config.activation_word,
        num_latents=config.d_sae(job),
        k=config.k,
        multi_topk=config.multi,
        normalize_decoder=config.normalize_decoder,
        transcode=config.transcodes(job),
        skip_connection=config.skip,
    )
    settings = parts.train_config(
        sae=coder,
        batch_size=batch_size,
        loss_fn=config.loss_fn,
        optimizer=config.optimizer,
        lr=config.lr,
        lr_warmup_steps=config.warmup_steps(job),
        auxk_alpha=config.auxk_alpha,
        dead_feature_threshold=config.dead_after,
        k_decay_steps=config.k_decay_steps,
        micro_acc_steps=config.micro_acc_steps,
        hookpoints=list(hookpoints),
        init_seeds=[job.seed],
        finetune=job.init_from,
        save_every=sys.maxsize,
        log_to_wandb=False,
        **more,
    )
    with surroundings(job.device), warnings.catch_warnings(), patch.dict(sys.modules, {"bitsandbytes": None, "bitsandbytes.optim": None}):
        warnings.simplefilter("ignore", FutureWarning)  # Muon is given sets of parameters; the state goes by their names
        trainer = parts.trainer(settings, dataset, model)
    library.LIBRARY.has(trainer, "sparsify's Trainer", *library.TRAINER_STATE)
    if job.init_from is not None:
        _warm_start(trainer.saes[hookpoints[0]], Path(job.init_from), job)
    return trainer


@torch.no_grad()
def _warm_start(coder: Any, path: Path, job: Job) -> None:
    """Weights of a checkpoint that Sparsify can say, in place; UsageError if it is not of this kind and size."""
    from saehub.checkpoint.foreign import Unsayable
    from saehub.checkpoint.load import load
    from saehub_sparsify.mapping import to_sparsify

    try:
        foreign = to_sparsify(copy.deepcopy(load(path)))
    except Unsayable as reason:
        raise UsageError(f"{path} cannot start {job.id}", where="init_from", why=str(reason), fix="a checkpoint of the same architecture") from reason
    wanted = {name: tuple(tensor.shape) for name, tensor in coder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in foreign.tensors.items()}
    same_kind = all(foreign.config.get(word, default) == getattr(coder.cfg, word) for word, default in (("activation", "topk"), ("transcode", False)))
    if wanted != found or not same_kind:
        differs = "; ".join(f"{name} {found.get(name)}, wanted {wanted.get(name)}" for name in sorted(set(wanted) | set(found)) if wanted.get(name) != found.get(name))
        raise UsageError(
            f"{path} cannot start {job.id}",
            where="init_from",
            why=differs or "another activation, or a transcoder for an autoencoder",
            fix="a checkpoint of the same architecture and sizes",
        )
    for name, tensor in coder.state_dict().items():
        tensor.copy_(foreign.tensors[name].float())


@contextmanager
def surroundings(device: str, *, draws: bool = True) -> Iterator[None]:
    """Random states (where something `draws`) and the matmul precision are the caller's again afterwards: the library sets both for the whole process."""
    precision = torch.get_float32_matmul_precision()
    cuda = torch.device(device)
    devices = [cuda.index if cuda.index is not None else torch.cuda.current_device()] if cuda.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=draws):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def cuda_caution(job: Job) -> list[str]:
    """On a GPU the library computes otherwise than on a CPU."""
    if not job.device.startswith("cuda"):
        return []
    return ["sparsify trained under bfloat16 autocast, as it does on GPUs that have it; features are computed in float32 (sparse_coder.py:205)"]
