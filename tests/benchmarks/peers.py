"""Sizes in; one full TopK or BatchTopK training step of each peer, through the peer's own code, out: shared by the benchmarks.

A quarter of the latents is dead, where asked, by setting each library's own counter before every step.
"""

from __future__ import annotations

import os

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder cannot run on a processor; this is its own switch


def dead_latents(n_latents: int) -> Tensor:
    """A fixed random quarter."""
    return torch.randperm(n_latents, generator=torch.Generator().manual_seed(1))[: n_latents // 4]


class SAELens:
    """`SAETrainer` of SAELens on `TopKTrainingSAE` or `BatchTopKTrainingSAE`, defaults."""

    def __init__(self, d: int, n_latents: int, k: int, batch: int, auxk: bool, architecture: str = "topk", device: str = "cpu"):
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        if architecture == "topk":
            from sae_lens.saes.topk_sae import TopKTrainingSAE as SAE
            from sae_lens.saes.topk_sae import TopKTrainingSAEConfig as Config
        else:
            from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE as SAE
            from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig as Config
        torch.manual_seed(0)
        sae = SAE(Config(d_in=d, d_sae=n_latents, k=k, dtype="float32", device=device))
        config = SAETrainerConfig(total_training_samples=batch * 100_000, train_batch_size_samples=batch, lr=3e-4, lr_end=3e-5, device=device)
        self.trainer = SAETrainer(config, sae, iter([]))
        self.dead_N = dead_latents(n_latents) if auxk else None

    def step(self, x_BD: Tensor) -> None:
        if self.dead_N is not None:
            self.trainer.n_forward_passes_since_fired[self.dead_N] = 1e6
        self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1


class DictionaryLearning:
    """`TopKTrainer.update` or `BatchTopKTrainer.update` of dictionary_learning, defaults, past its warm-up of thresholds."""

    def __init__(self, d: int, n_latents: int, k: int, batch: int, auxk: bool, architecture: str = "topk", device: str = "cpu"):
        if architecture == "topk":
            from dictionary_learning.trainers.top_k import TopKTrainer as Trainer
        else:
            from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as Trainer
        names = dict(layer=0, lm_name="none", device=device, seed=0)
        self.trainer = Trainer(steps=100_000, activation_dim=d, dict_size=n_latents, k=k, auxk_alpha=1 / 32 if auxk else 0.0, **names)
        self.dead_N = dead_latents(n_latents) if auxk else None
        self.steps = 1001

    def step(self, x_BD: Tensor) -> None:
        if self.dead_N is not None:
            self.trainer.num_tokens_since_fired[self.dead_N] = 10**9
        self.steps += 1
        self.trainer.update(self.steps, x_BD)


class Sparsify:
    """The body of Sparsify's `Trainer.fit` for one hookpoint, line by line, with Adam (its `loss_fn` is fvu); TopK only."""

    def __init__(self, d: int, n_latents: int, k: int, batch: int, auxk: bool, architecture: str = "topk", device: str = "cpu"):
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder
        from transformers import get_linear_schedule_with_warmup

        torch.manual_seed(0)
        self.sae = SparseCoder(d, SparseCoderConfig(num_latents=n_latents, k=k, activation="topk"), device, dtype=torch.float32)
        self.optimizer = torch.optim.Adam([dict(params=self.sae.parameters(), lr=2e-4 / (n_latents / 2**14) ** 0.5)])
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 1000, 100_000)
        self.alpha = 1 / 32 if auxk else 0.0
        self.since_F, self.fired_F = torch.zeros(n_latents, dtype=torch.long, device=device), torch.zeros(n_latents, dtype=torch.bool, device=device)
        self.dead_N = dead_latents(n_latents) if auxk else None

    def step(self, x_BD: Tensor) -> None:
        sae = self.sae
        if self.dead_N is not None:
            self.since_F[self.dead_N] = 10**9
        x_BD = x_BD.detach().clone()  # as its hook copies the rows
        sae.set_decoder_norm_to_unit_norm()
        dead_F = (self.since_F > 10_000_000) if self.alpha > 0 else None
        variance = (x_BD - x_BD.mean(0)).pow(2).sum()
        out = sae(x=x_BD, y=x_BD, dead_mask=dead_F, total_variance=variance)
        self.fired_F[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        loss = out.fvu + self.alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        with torch.no_grad():
            self.since_F += x_BD.shape[0]
            self.since_F[self.fired_F] = 0
            self.fired_F.zero_()
