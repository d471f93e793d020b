"""A tiny language model, random token sequences with excluded positions, and the context that `native/core` is given, for all its tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saehub.activations import taps
from saehub.api import EvalContext, EvalDataset, Rows, Subject
from saehub.sites import Site
from saehub.testing.stage import Stage

torch.set_num_threads(1)
BOS = 256
CONTEXT = 12


class Tokens:
    """Random sequences: BOS first, another BOS in some, and a tenth of the other positions excluded."""

    def __init__(self, sequences: int, seed: int, *, exclude: bool = True, low: int = 0, high: int = 256):
        draw = torch.Generator().manual_seed(seed)
        self.n_sequences, self.context = sequences, CONTEXT
        self.ids_ST = torch.randint(low, high, (sequences, CONTEXT), generator=draw)
        self.keep_ST = torch.ones(sequences, CONTEXT, dtype=torch.bool)
        if exclude:
            self.keep_ST = torch.rand(sequences, CONTEXT, generator=draw) > 0.1
            self.ids_ST[:, 0] = BOS
            self.ids_ST[::5, 7] = BOS
            self.keep_ST &= self.ids_ST != BOS
            self.keep_ST[3] = False  # a sequence without any row

    def tokens(self, i: int, j: int) -> torch.Tensor:
        return self.ids_ST[i:j]

    def keep(self, i: int, j: int) -> torch.Tensor:
        return self.keep_ST[i:j]


@pytest.fixture(scope="session")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="session")
def datasets() -> dict[str, EvalDataset]:
    return {
        "in_sample": EvalDataset("in_sample", Tokens(24, 1), "hash-in"),
        "out_of_sample": EvalDataset("out_of_sample", Tokens(17, 2, low=60, high=200), "hash-out"),
    }


@pytest.fixture(scope="session")
def activations(stage) -> Callable[[EvalDataset, str], torch.Tensor]:
    """All rows [S, T, d] of a dataset at a site, by a plain hook of the stage's own."""

    def get(dataset: EvalDataset, site: str) -> torch.Tensor:
        return stage.reference(site, dataset.tokens.ids_ST).view(dataset.tokens.n_sequences, CONTEXT, -1)

    return get


@pytest.fixture
def context(stage, datasets, tmp_path) -> Callable[..., EvalContext]:
    """An EvalContext over `saes` (id -> (sae, site, target_site))."""

    def make(saes: dict, *, data: dict | None = None, lm_batch: int = 5, model=stage.model, spoil=None, sequences: bool = True) -> EvalContext:
        hf, shape = stage.model.hf, stage.model.shape

        def rows(dataset: EvalDataset, sites):
            tokens = dataset.tokens if dataset.tokens is not None else spoil.tokens
            for i in range(0, tokens.n_sequences, lm_batch):
                j = min(i + lm_batch, tokens.n_sequences)
                read = taps.read(hf, tokens.tokens(i, j), {site: Site.parse(site).tap(shape) for site in sites})
                acts = {site: x.flatten(0, 1) for site, x in read.items()}
                if callable(spoil):
                    acts = {site: spoil(site, x, i) for site, x in acts.items()}
                ids_N = tokens.tokens(i, j).flatten()
                units_N = torch.arange(i, j).repeat_interleave(CONTEXT)
                positions_N = torch.arange(CONTEXT).repeat(j - i)
                yield Rows(acts, tokens.keep(i, j).flatten(), *((ids_N, positions_N, units_N) if sequences else (None, None, None)))

        subjects = [Subject(id, sae, Path("."), site, target, f"hash-{id}") for id, (sae, site, target) in saes.items()]
        return EvalContext(subjects, model, data or datasets, 7, "cpu", tmp_path, lm_batch, rows=rows)

    return make


@pytest.fixture(scope="session")
def measure():
    """Run `native/core` and look rows up by SAE, dataset and metric: `found["sae", "in_sample", "fvu"]`."""
    from saehub_native.evaluate.config import CoreConfig
    from saehub_native.evaluate.core import CoreEvaluator

    def run(context: EvalContext, **settings):
        rows = CoreEvaluator(CoreConfig(**settings)).evaluate(context)
        found = {(row.subjects[0], row.dataset, row.metric): row for row in rows}
        assert len(found) == len(rows)
        return found

    return run


@pytest.fixture(scope="session")
def fitted(datasets, activations):
    """A TopK SAE (64 latents, k = 6) whose latents point at rows of the in-sample dataset at `site`."""
    from saehub.testing.saes import fit_to

    def make(site: str = "resid_post.0", d_sae: int = 64, k: int = 6):
        dataset = datasets["in_sample"]
        return fit_to(activations(dataset, site)[dataset.tokens.keep_ST], d_sae, k)

    return make


@pytest.fixture(scope="session")
def plain() -> SimpleNamespace:
    return SimpleNamespace(BOS=BOS, CONTEXT=CONTEXT, Tokens=Tokens)
