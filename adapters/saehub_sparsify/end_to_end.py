"""A language model and token sequences in; an SAE that Sparsify's own `Trainer` trained inside it, on the model's loss, out. Runs in the plugin's worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from saehub.errors import StageFailed, UsageError
from saehub_sparsify.names import hookpoint
from saehub_sparsify.training import Drive, cuda_caution, make_trainer

if TYPE_CHECKING:
    from saehub.api import Job
    from saehub.checkpoint.sae import SAE
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset
    from saehub_sparsify.config import EndToEndConfig


class Sequences(Dataset):
    """Training sequences from number `start` of the run on, over and over if there are fewer than the run takes."""

    def __init__(self, tokens: TokenDataset, count: int, start: int = 0):
        self.tokens, self.count, self.start = tokens, count, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = self.tokens.calibration_sequences
        at = first + (self.start + index) % (self.tokens.n_sequences - first)
        return {"input_ids": self.tokens.tokens(at, at + 1)[0]}

    def select(self, indices: range) -> Sequences:
        """The rest of the run, as a resumed fit() asks for it."""
        return Sequences(self.tokens, len(indices), self.start + indices.start)


class EndToEndTrainer:
    """Implements `saehub.api.LoopTrainer`."""

    def __init__(self, config: EndToEndConfig):
        self.config = config

    def open(self, job: Job, model: ModelHandle, tokens: TokenDataset) -> EndToEndSession:
        """One SAE in the model. Raises UsageError for settings that do not fit the job or the model."""
        problems = [*self.config.check(job), *self.config.check_model(job, model.shape, tokens.context)]
        if problems:
            raise UsageError(f"{job.id} cannot be trained: " + "; ".join(problems), where=f"train {job.id}", fix="saehub recipe check")
        return EndToEndSession(self.config, job, model, tokens)


class EndToEndSession:
    """Implements `saehub.api.LoopSession`: one upstream Trainer on the model, stopped after every step."""

    def __init__(self, config: EndToEndConfig, job: Job, model: ModelHandle, tokens: TokenDataset):
        self.config, self.job = config, job
        sequences = config.batch // tokens.context
        point = hookpoint(job.site, job.target_site, model.shape).removeprefix(f"{model.hf.base_model_prefix}.")
        trainer = make_trainer(
            config,
            job,
            [point],
            Sequences(tokens, job.steps * sequences),
            model.hf,
            batch_size=sequences,
            exclude_tokens=list(tokens.manifest["exclude_ids"]),
        )
        self.drive = Drive(trainer, point, config, job)
        self.outputs: list[Any] = []
        model.hf.register_forward_hook(Outputs(self.outputs))

    def advance(self) -> None:
        """One optimizer step on the next sequences. Raises StageFailed when they are used up, or at a loss that is not finite."""
        if self.drive.trainer.global_step >= self.job.steps:
            raise StageFailed(f"{self.job.id} has taken all of its {self.job.steps} steps", where=f"train {self.job.id}")
        self.outputs.clear()
        self.drive.advance()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Of the last step: `loss` (nats a token: the divergence, or the cross-entropy of the text), `fvu`, `l0`, `dead`, `lr`."""
        found = self.drive.metrics()
        if self.config.loss == "ce" and self.job.target_site is not None:
            found.pop("fvu", None)  # against the identity that stands for the module
        if self.outputs and self.config.loss == "ce":
            found["loss"] = float(self.outputs[-1].loss)
        elif len(self.outputs) > 1:
            clean, dirty = (output.logits.log_softmax(-1) for output in self.outputs[-2:])
            # What the library minimises is the cross-entropy to the clean predictions, which differs by their entropy: a constant.
            found["loss"] = float((clean.exp() * (clean - dirty)).sum(-1).mean())
        return found

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Weights, moments, counters; which sequences come next follows from the step."""
        return self.drive.state()

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Continue from what `state` returned."""
        self.outputs.clear()
        self.drive.load_state(tensors, data)

    def cautions(self) -> list[str]:
        """What is known only where it ran."""
        return cuda_caution(self.job)

    def finish(self) -> SAE:
        """The SAE as the library would save it."""
        return self.drive.finish()


class Outputs:
    """Keeps what the model gave in a step (a hook that does not hold the session)."""

    def __init__(self, outputs: list[Any]):
        self.outputs = outputs

    def __call__(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.outputs.append(output)
