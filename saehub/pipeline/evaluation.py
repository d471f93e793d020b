"""Paths and plain settings in; the open `EvalContext` that an evaluator works on out, in the hub or in a worker."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from saehub.api import EvalContext, EvalDataset, Measurement, ModelSpec, Rows, Subject


@dataclass
class HubEvalContext(EvalContext):
    """An EvalContext that can be described to a worker process."""

    spec: dict[str, Any] | None = None


def open_context(spec: dict[str, Any], *, model: Any = None, extractor: Any = None, emit: Any = None) -> HubEvalContext:
    """Build the context from plain data: here, or in the worker that received it.

    `spec`: subjects [{id, path, site, target_site}], model (ModelSpec fields or None), datasets {name: folder}, extractor {address, config},
    seed, device, work_dir, lm_batch; measured (rows of other evaluators as JSON) and cautions {SAE: sentences}, where the evaluator needs them; rows (how many of
    each dataset are read; all without it).
    """
    from saehub.checkpoint.format import load, read_header, tensors_hash
    from saehub.data.tokens import TokenDataset

    subjects = []
    for item in spec["subjects"]:
        sae = load(item["path"]).to(spec["device"])
        digest = tensors_hash(read_header(item["path"])["tensors"])
        subjects.append(Subject(item["id"], sae, Path(item["path"]), item["site"], item["target_site"], digest))
    if model is None and spec["model"] is not None:
        from saehub.data.model import ModelHandle

        model = ModelHandle.load(ModelSpec(**spec["model"]))
    opened = {name: TokenDataset.open(Path(folder)) for name, folder in spec["datasets"].items()}
    datasets = {name: EvalDataset(name, tokens, tokens.hash) for name, tokens in opened.items()}

    def rows(dataset: EvalDataset, sites: Sequence[str]) -> Iterator[Rows]:
        session = _extractor(spec, extractor).open(model, dataset.tokens, list(sites), lm_batch=spec["lm_batch"])
        try:
            left = spec.get("rows") or math.inf  # a look during training reads the first rows only
            for batch in range(session.n_batches):
                if left <= 0:
                    break
                left -= session.kept(batch)
                yield session.rows(batch)
        finally:
            session.close()

    measured = tuple(measurement(row) for row in spec.get("measured", ()))
    work_dir = Path(spec["work_dir"])
    work_dir.mkdir(parents=True, exist_ok=True)
    return HubEvalContext(
        subjects, model, datasets, spec["seed"], spec["device"], work_dir, spec["lm_batch"], emit or (lambda event: None), rows, measured,
        spec.get("cautions", {}), spec=spec,
    )


def measurement(data: dict[str, Any]) -> Measurement:
    """A row back from `Measurement.to_json`."""
    return Measurement(**{**data, "subjects": tuple(data["subjects"]), "subject_hashes": tuple(data["subject_hashes"])})


def _extractor(spec: dict[str, Any], given: Any) -> Any:
    if given is not None:
        return given
    from saehub.pipeline.local import make_local
    from saehub.plugins import catalog

    address, config = spec["extractor"]["address"], spec["extractor"]["config"]
    registered = catalog().find("extractor", address)
    if registered.component.requires and os.environ.get("SAEHUB_WORKER") != registered.plugin:
        return _workers().make(registered, config)  # another plugin's library stays out of this process
    return make_local("extractor", address, config)


@lru_cache(maxsize=1)
def _workers() -> Any:
    """The workers of this worker; they end with it."""
    from saehub.pipeline.components import Components

    return Components()
