"""SAEs, a language model and texts in; how far each SAE's active latents stay the same when a text is put differently, beside a null, out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saehub.api import EvalContext, Measurement, Subject
from saehub.data.packing import bos_id
from saehub.errors import StageFailed
from saehub.jsonio import sha256_file
from saehub_native.evaluate.robust.config import ParaphraseConfig
from saehub_native.evaluate.robust.definitions import BY_METRIC
from saehub_native.evaluate.robust.perturb import perturb, read_pairs
from saehub_native.evaluate.robust.reading import Readers, ids_of, measure, texts_of

EVALUATOR = "native/paraphrase"


class ParaphraseEvaluator:
    """`native/paraphrase`. Each text is one forward pass of its own: no padding, so no batch size enters."""

    def __init__(self, config: ParaphraseConfig | None = None):
        self.config = config or ParaphraseConfig()

    def evaluate(self, context: EvalContext) -> list[Measurement]:
        """`paraphrase_overlap@<perturbation>` and its null, for every SAE and dataset; `@pairs` for the user's file, on no dataset."""
        model = context.model
        if model is None or model.tokenizer is None:
            raise StageFailed(f"{EVALUATOR} needs a model with a tokenizer", fix="a model whose folder holds its tokenizer")
        with torch.no_grad():
            return list(self._run(context))

    def _run(self, context: EvalContext) -> Iterator[Measurement]:
        config, tokenizer, readers = self.config, context.model.tokenizer, Readers(context)
        bos = bos_id(tokenizer)
        if config.pairs:
            pairs = read_pairs(config.pairs, config.texts)
            longest = min(context.model.shape.context, max((d.tokens.context for d in context.datasets.values()), default=512))
            firsts = [self._active(readers, text, longest, bos) for text, _ in pairs]
            others = [self._active(readers, text, longest, bos) for _, text in pairs]
            yield from self._rows(readers, "pairs", firsts, others, note=f"{Path(config.pairs).name}, SHA-256 {sha256_file(Path(config.pairs))[:16]}")
        for done, (name, dataset) in enumerate(context.datasets.items()):
            texts = texts_of(dataset.tokens, tokenizer, config.texts)
            start = int(dataset.tokens.tokens(0, 1)[0, 0])
            head = bos if start == bos else None
            where = {"dataset": name, "dataset_hash": dataset.hash}
            firsts = [self._active(readers, text, dataset.tokens.context, head) for text in texts]
            for at, how in enumerate(config.perturbations):
                context.emit({"progress": (done + at / len(config.perturbations)) / len(context.datasets), "text": f"{name}: {how}"})
                changed = {i: other for i, text in enumerate(texts) if (other := perturb(text, how, i)) != text and other.strip()}
                if len(changed) < 2:
                    for subject in context.subjects:
                        for metric in ("paraphrase_overlap", "paraphrase_overlap_null"):
                            reason = f"{how} changes {len(changed)} of {len(texts)} texts; an error needs two"
                            yield measure(BY_METRIC[metric], EVALUATOR, f"{metric}@{how}", subject, None, status="not_measured", reason=reason, **where)
                    continue
                others = [self._active(readers, text, dataset.tokens.context, head) for text in changed.values()]
                yield from self._rows(readers, how, [firsts[i] for i in changed], others, **where)

    def _active(self, readers: Readers, text: str, context: int, bos: int | None) -> dict[str, Tensor]:
        """SAE id -> bool [F]: which latents fire somewhere in the text, BOS aside."""
        model = readers.context.model
        ids = ids_of(text, model.tokenizer, context, bos)
        skip = int(bos is not None)
        if len(ids) <= skip:
            return {}
        rows = readers.rows(model, torch.tensor([ids]))
        found = {}
        for subject in readers.context.subjects:
            acts_BTF = readers.encode(subject, rows[subject.site])
            if acts_BTF is not None:
                found[subject.id] = (acts_BTF[0, skip:] != 0).any(0).cpu()
        return found

    def _rows(self, readers: Readers, how: str, firsts: list[dict], others: list[dict], note: str | None = None, **where) -> Iterator[Measurement]:
        shifted = [*others[1:], others[0]]
        for subject in readers.context.subjects:
            for metric, partners in (("paraphrase_overlap", others), ("paraphrase_overlap_null", shifted)):
                known, name = BY_METRIC[metric], f"{metric}@{how}"
                values = overlaps(subject, firsts, partners)
                reason = readers.broken.get(subject.id) or (f"it fires on {len(values)} of {len(firsts)} texts" if len(values) < 2 else None)
                if reason:
                    yield measure(known, EVALUATOR, name, subject, None, status="not_measured", reason=reason, **where)
                    continue
                stderr = float(values.std(ddof=1) / np.sqrt(len(values)))
                parts = {"numerator": values.tolist(), "denominator": [1.0] * len(values)}
                yield measure(known, EVALUATOR, name, subject, float(values.mean()), stderr=stderr, n=len(values), unit_of_n="texts", note=note, parts=parts, **where)


def overlaps(subject: Subject, firsts: list[dict], others: list[dict]) -> np.ndarray:
    """Jaccard overlap of each pair of sets on which something fires."""
    found = []
    for a, b in zip(firsts, others, strict=True):
        if subject.id in a and subject.id in b and (union := int((a[subject.id] | b[subject.id]).sum())):
            found.append(int((a[subject.id] & b[subject.id]).sum()) / union)
    return np.array(found)
