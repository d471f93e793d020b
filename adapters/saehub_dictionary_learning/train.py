"""Batches of rows in, a trained SAE out: the library's own `trainer.update`, unmodified, with its random state, norm and units kept apart from everything else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.checkpoint.foreign import Unsayable
from saehub.errors import FormatError, StageFailed, UsageError
from saehub_dictionary_learning import names, snapshot
from saehub_dictionary_learning.mapping import from_dictionary_learning, to_dictionary_learning

if TYPE_CHECKING:
    from saehub.api import Calibration, Job
    from saehub.checkpoint.sae import SAE
    from saehub_dictionary_learning.config import DictionaryConfig

STATE_VERSION = 1


class DictionaryTrainer:
    """Implements `saehub.api.Trainer` for every config that names a `trainer` of the library."""

    def __init__(self, config: DictionaryConfig):
        self.config = config

    def open(self, job: Job, calibration: Calibration) -> DictionarySession:
        """One dictionary, as the library initialises it. UsageError for settings that do not fit the job; MissingDependency if the library changed."""
        problems = list(self.config.check(job))
        if problems:
            raise UsageError(f"{job.id} cannot be trained: " + "; ".join(problems), where=f"train {job.id}", fix="saehub recipe plan FILE")
        return DictionarySession(self.config, job, calibration)


class DictionarySession:
    """Implements `saehub.api.TrainerSession` around one trainer of the library."""

    def __init__(self, config: DictionaryConfig, job: Job, calibration: Calibration):
        from saehub_dictionary_learning.library import LIBRARY, USED, trainer_class

        self.config, self.job = config, job
        self.norm = self._norm(calibration)
        self.steps_done, self.warm = 0, job.init_from is not None
        self._random: dict[str, Tensor] = {}
        self._x_BD: Tensor | None = None
        self._loss: float | None = None
        self._last: dict[str, float] = {}
        self._learnt: list[str] = []
        settings = {
            "steps": job.steps,
            "activation_dim": job.d_in,
            "dict_size": config.d_sae(job),
            "device": job.device,
            "lm_name": "",
            "layer": _place(job.site)["layer"],
            **config.settings(job),
        }
        cls = trainer_class(config.trainer, {**settings, "seed": job.seed})
        with self._apart():
            torch.manual_seed(job.seed)  # JumpReluTrainer ignores `seed` (trainers/jumprelu.py:76: nn.Module comes first among its bases)
            self.trainer = cls(**settings, seed=job.seed)
        LIBRARY.has(self.trainer, config.trainer, *USED, *config.attributes(job))
        for name, value in config.attributes(job).items():
            setattr(self.trainer, name, value)
        if job.init_from is not None:
            self._warm_start(Path(job.init_from))

    def _norm(self, calibration: Calibration) -> float | None:
        """√(mean ‖x‖²) over calibration rows, in float64: what the library's `get_norm_factor` estimates (training.py:83)."""
        if not self.config.normalize_activations:
            return None
        wanted = self.config.calibration
        x_ND, _ = calibration(min(wanted, self.job.calibration or wanted))
        norm = float(x_ND.double().square().sum(1).mean().sqrt())
        if not 0 < norm < float("inf"):
            raise StageFailed(f"the calibration rows of {self.job.site} have mean square norm {norm}", where=f"train {self.job.id}")
        return norm

    def _warm_start(self, path: Path) -> None:
        """The tensors of a checkpoint into the dictionary, in units of the normalised rows."""
        from saehub.checkpoint.load import load

        sae, mine = load(path), self.trainer.ae
        try:
            foreign = to_dictionary_learning(sae)
        except Unsayable as reason:
            raise UsageError(f"{path} cannot start {self.job.id}", why=str(reason), where=f"train {self.job.id}") from reason
        state = {name: value.float() if value.is_floating_point() else value for name, value in foreign.tensors.items()}
        kept = {name: value for name, value in mine.state_dict().items() if name in ("k", "threshold") and name not in state}
        wanted = {name: tuple(value.shape) for name, value in mine.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in {**state, **kept}.items()}
        dict_class = foreign.config["trainer"]["dict_class"]
        if dict_class != type(mine).__name__ or given != wanted or not torch.equal(*(_groups(each) for each in (state, mine.state_dict()))):
            raise UsageError(
                f"{path} cannot start {self.job.id}",
                why=f"it is a {dict_class} with {given}; this trainer has a {type(mine).__name__} with {wanted}",
                where=f"train {self.job.id}",
                fix="init_from: a checkpoint of the same architecture and sizes",
            )
        if "k" in state:
            state["k"] = mine.k
        mine.load_state_dict({**state, **kept})
        if self.norm is not None:
            mine.scale_biases(1 / self.norm)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """PyTorch's random state is this session's own inside, gradients are on, and outside nothing has changed."""
        device = torch.device(self.job.device)
        on_gpu = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.enable_grad():
            if self._random:
                torch.set_rng_state(self._random["cpu"])
                if on_gpu:
                    torch.cuda.set_rng_state(self._random["cuda"], device)
            yield
            self._random = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if on_gpu else {})

    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        """One `trainer.update(step, x)` on rows divided by the norm, or on a copy of them."""
        x_BD = x_BD.detach().to(self.job.device, torch.float32)
        x_BD = x_BD.clone() if self.norm is None else x_BD / self.norm
        # Step 0 makes the TopK family set b_dec from its batch, which would undo a warm start.
        step = max(self.steps_done, 1) if self.warm else self.steps_done
        with self._apart():
            loss = self.trainer.update(step, x_BD)
        self._loss = float(loss) if isinstance(loss, (int, float)) else None
        self._x_BD = x_BD
        self.steps_done += 1

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Of the last batch after its step, by the library's `encode` as in training, in units of the normalised rows: `loss` as its `update`
        returned it (mean Σe² where it returns none), `fvu`, `l0`, `dead` (share of latents, where the trainer counts), `lr`."""
        if self._x_BD is None:  # nothing since it was opened or restored
            return dict(self._last)
        x_BD, ae = self._x_BD, self.trainer.ae
        f_BF = ae.encode(x_BD, use_threshold=False) if self.config.word in ("batchtopk", "matryoshka") else ae.encode(x_BD)
        squared = float((x_BD - ae.decode(f_BF)).square().sum())
        variance = float((x_BD - x_BD.mean(0)).square().sum())
        found = {"loss": squared / x_BD.shape[0] if self._loss is None else self._loss, "l0": float((f_BF != 0).sum(1).float().mean())}
        found["lr"] = float(self.trainer.scheduler.get_last_lr()[0])
        if variance > 0:
            found["fvu"] = squared / variance
        if hasattr(self.trainer, "num_tokens_since_fired"):
            found["dead"] = float((self.trainer.num_tokens_since_fired >= self.trainer.dead_feature_threshold).float().mean())
        self._last, self._x_BD = found, None
        return dict(found)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Dictionary, optimizer, schedule, counters, random state and norm. Refuses to save a state that is not finite."""
        last = self.metrics()
        tensors, data = snapshot.take(self.trainer)
        broken = [name for name, t in tensors.items() if name.startswith("ae.") and t.is_floating_point() and not bool(t.isfinite().all())]
        if broken or not all(abs(value) < float("inf") for value in last.values()):
            raise StageFailed(
                f"{self.job.id} is not finite after step {self.steps_done} of {self.job.steps}: {', '.join(broken) or last}",
                where=f"train {self.job.id}",
                why="the learning rate is too high, or the rows hold extreme values",
                fix="a lower lr in the recipe's `with:`; what was saved before stays valid",
            )
        tensors |= {f"random.{name}": value.cpu().clone() for name, value in self._random.items()}
        return tensors, {**data, "version": STATE_VERSION, "steps_done": self.steps_done, "norm": self.norm, "last": last}

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Go on where `state` was taken; FormatError if it is of another version or other settings."""
        if data.get("version") != STATE_VERSION:
            raise FormatError(f"the state of {self.job.id} has version {data.get('version')}; this saehub reads {STATE_VERSION}", where=f"train {self.job.id}")
        snapshot.put(self.trainer, tensors, data)
        self._random = {name.removeprefix("random."): value.clone() for name, value in tensors.items() if name.startswith("random.")}
        self.steps_done, self.norm, self._last, self._x_BD = int(data["steps_done"]), data["norm"], dict(data["last"]), None

    def finish(self) -> SAE:
        """The SAE in the units of the rows that it was given: the library's `scale_biases(norm)` on a copy, read as its folder would be."""
        ae = copy.deepcopy(self.trainer.ae).to("cpu")
        if self.norm is not None:
            ae.scale_biases(self.norm)
        state = {name: value.detach().contiguous().clone() for name, value in ae.state_dict().items()}
        config = {"trainer": {**self.trainer.config, **_place(self.job.site)}}
        if self.config.word in ("batchtopk", "matryoshka") and not float(state["threshold"]) >= 0:
            self._learnt.append(f"its threshold was never set (step {self.steps_done} of {self.job.steps}): encode() is a plain ReLU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about a file, and there is none; what they say is kept below
            sae = from_dictionary_learning(config, state, Path(self.job.id))
        self._learnt += sae.provenance.pop("cautions", [])
        sae.provenance = {"origin": {**sae.provenance["origin"], "settings": self._resolved()}}
        return sae

    def _resolved(self) -> dict[str, Any]:
        """What the library was given, so that anyone can drive it the same way without saehub."""
        return {**self.config.settings(self.job), **self.config.attributes(self.job), "seed": self.job.seed, "norm_factor": self.norm}

    def cautions(self) -> list[str]:
        """What training showed that a user should know."""
        return list(dict.fromkeys(self._learnt))


def _place(site: str) -> dict[str, Any]:
    """The library's words for a site; one that is no site of a model (a file's own name) stands as its `layer`, which is free text."""
    try:
        words = names.trainer_words({"site": site})
    except UsageError:
        return {"layer": site}
    return words if words["layer"] is not None else {**words, "layer": site}


def _groups(state: dict[str, Tensor]) -> Tensor:
    return state["group_sizes"].cpu() if "group_sizes" in state else torch.zeros(0)
