"""A language model, token ids and sites in; the rows at these sites and what an SAE makes of them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saehub.activations import taps
from saehub.api import EvalContext, Measurement, Subject
from saehub.data.model import ModelHandle
from saehub.errors import Interrupted, StageFailed
from saehub.sites import Site
from saehub_native.evaluate.definitions import Definition
from saehub_native.evaluate.subjects import on_device


class Readers:
    """All SAEs of a context over the same forward passes; one that breaks says so in its own rows."""

    def __init__(self, context: EvalContext):
        self.context = context
        self.saes = {subject.id: on_device(subject.sae, torch.device(context.device)) for subject in context.subjects}
        self.sites = list(dict.fromkeys(site for s in context.subjects for site in (s.site, s.target_site or s.site)))
        self.broken: dict[str, str] = {}
        """SAE id -> why it has no numbers."""

    def rows(self, model: ModelHandle, tokens_BT: Tensor) -> dict[str, Tensor]:
        """site -> [B, T, d]."""
        return taps.read(model.hf, tokens_BT, {site: Site.parse(site).tap(model.shape) for site in self.sites})

    def encode(self, subject: Subject, x_BTD: Tensor) -> Tensor | None:
        """Features [B, T, F]; None (and a reason in `broken`) where the SAE cannot read the rows."""
        if subject.id in self.broken:
            return None
        try:
            acts_BTF = self.saes[subject.id].encode(x_BTD.to(self.context.device))
            if not bool(acts_BTF.isfinite().all()):
                raise StageFailed("its features hold NaN or infinite numbers")
            return acts_BTF
        except Interrupted:
            raise
        except Exception as error:
            self.broken[subject.id] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            return None


def measure(known: Definition, evaluator: str, metric: str, subject: Subject, value: float | None, **more) -> Measurement:
    """A row with its interval."""
    stderr = more.get("stderr")
    if value is not None and stderr is not None:
        more |= {"ci_low": value - 1.959964 * stderr, "ci_high": value + 1.959964 * stderr}
    return Measurement(metric, value, (subject.id,), evaluator, known.id, (subject.hash,), subject.site, better=known.better, **more)


def texts_of(tokens, tokenizer, most: int) -> list[str]:
    """The first `most` sequences of a dataset as text, without special tokens."""
    ids_BT = tokens.tokens(0, min(most, tokens.n_sequences))
    return [text for text in tokenizer.batch_decode(ids_BT.tolist(), skip_special_tokens=True) if text.strip()]


def ids_of(text: str, tokenizer, context: int, bos: int | None) -> list[int]:
    """At most `context` token ids, BOS first where the dataset has one."""
    head: Sequence[int] = [] if bos is None else [bos]
    return [*head, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]][:context]
