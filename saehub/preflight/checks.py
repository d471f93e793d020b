"""Rows of an extractor, the model and the settings in; one line a question (is it that tensor, finite, in range, shuffled, …), with the fix, out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.preflight import tensor

if TYPE_CHECKING:
    from saehub.api import Rows
    from saehub.data.model import ModelHandle
    from saehub.preflight.order import Order

FEW = 4
"""Sequences that whole forward passes (with logits) are made of."""
SINK = 10.0
"""A row is an outlier from so many times the median norm."""
FEW_SEQUENCES = 64
"""A block with fewer sequences than this shuffles little: rows of one text follow each other."""
NORM_APART = 3.0
"""Without normalisation: a mean norm so many times above or below √d is worth a word."""
ROUNDING = 1e-3
"""Share of the variance that rounding to the stream's dtype may add."""
MAX = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}


@dataclass(frozen=True)
class Check:
    """One line."""

    name: str
    """Such as `resid_post.2: same as a plain hook`."""
    status: str
    """`ok`, `warning`, `failed`, or `skipped` where it cannot be asked."""
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Sample:
    """Some language-model batches of an extractor at its sites."""

    rows: Rows
    """One batch, in sequence order, excluded rows included."""
    tokens_BT: Tensor | None
    """Its token ids, whole sequences; None where activations come from files."""
    settings: dict[str, Any]
    """dtype, normalize, context, block, lm_batch, batch, exclude (token ids); what the recipe says. `of`: rows that the files hold."""
    order: Order | None = None
    """How rows follow each other in the stream; None where they come without sequences."""

    def few(self, site: str) -> tuple[Tensor, Tensor]:
        """(rows [n, d], token ids [b, T]) of the first few sequences, excluded rows included: logits of many would be large."""
        tokens_BT = self.tokens_BT[:FEW]
        return self.rows.acts[site][: tokens_BT.numel()], tokens_BT

    def kept(self, site: str) -> Tensor:
        """[n, d] float32: the rows that a trainer gets."""
        return self.rows.acts[site][self.rows.keep_N.to(self.rows.acts[site].device)].float()


def check_site(site: str, sample: Sample, model: ModelHandle | None) -> list[Check]:
    """All checks of one site. A check that itself breaks is a warning that says so: it never stops the others."""
    found: list[Check] = []
    for ask in (_finite, _constant, _dtype, _norms, _normalisation, _tensor, _splice):
        try:
            found += [Check(f"{site}: {check.name}", check.status, check.detail, check.fix) for check in ask(site, sample, model)]
        except Exception as error:  # noqa: BLE001
            found.append(Check(f"{site}: {ask.__name__.strip('_')}", "warning", f"could not be checked: {type(error).__name__}: {error}"))
        if found[-1].status == "failed" and ask is _finite:
            break  # everything else would only repeat it
    return found


def check_stream(sample: Sample, model: ModelHandle | None) -> list[Check]:
    """The checks that belong to no single site: padding, order."""
    return [*_padding(sample, model), *_order(sample)]


# ---------------------------------------------------------------------- the numbers
def _finite(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    x_ND = sample.kept(site)
    bad = int((~x_ND.isfinite().all(1)).sum())
    if bad:
        fix = "model.dtype: bfloat16 or float32 (float16 overflows), and check the model's weights"
        yield Check("finite", "failed", f"{bad:,} of {len(x_ND):,} rows hold NaN or infinite numbers", fix)
        return
    total = sample.settings.get("of")
    part = "" if total in (None, len(x_ND)) else f" of {total:,}, from all over the files; the others are checked when they are read"
    yield Check("finite", "ok", f"{len(x_ND):,} rows{part}")


def _constant(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    x_ND = sample.kept(site).double()
    spread_D = x_ND.std(0)
    scale = float(x_ND.abs().mean()) or 1.0
    still = int((spread_D <= 1e-6 * scale).sum())
    if still == len(spread_D):
        yield Check("varies", "failed", "every row is the same: there is nothing to learn", "another site: this module's output does not depend on the text")
    elif still:
        yield Check("varies", "warning", f"{still} of {len(spread_D)} coordinates never change", "usual for masked or pruned models; else check the hook")
    else:
        yield Check("varies", "ok", f"standard deviation {float(spread_D.min()):.3g} to {float(spread_D.max()):.3g} over coordinates")


def _dtype(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    x_ND, name = sample.kept(site), sample.settings.get("dtype", "float32")
    cast = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    largest = float(x_ND.abs().max())
    lost = int((~x_ND.to(cast).isfinite()).sum())
    if lost:
        fix = "extract.dtype: bfloat16 or float32" if name == "float16" else "extract.dtype: float32"
        yield Check("dtype", "failed", f"{lost:,} numbers overflow {name} (largest {largest:.3g}, its limit {MAX[name]:.3g})", fix)
        return
    variance = float(x_ND.double().var(0).sum())
    noise = float((x_ND.double() - x_ND.to(cast).double()).square().sum(1).mean())
    if largest > MAX[name] / 4 and name == "float16":
        yield Check("dtype", "warning", f"largest number {largest:.3g}, float16 ends at {MAX[name]:.0f}", "extract.dtype: bfloat16 or float32")
    elif variance > 0 and noise > ROUNDING * variance:
        yield Check("dtype", "warning", f"rounding to {name} adds {noise / variance:.2%} of the variance: a few large coordinates use up its digits", "extract.dtype: float32")
    else:
        yield Check("dtype", "ok", f"{name}, largest number {largest:.3g}")


def _norms(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    x_ND = sample.kept(site)
    norms_N = x_ND.norm(dim=1)
    median, mean = float(norms_N.median()), float(norms_N.mean())
    far = norms_N > SINK * median
    words = f"norm {mean:.4g} on average, median {median:.4g}, largest {float(norms_N.max()):.4g}"
    if not bool(far.any()):
        yield Check("norms", "ok", words)
        return
    share, weight = float(far.float().mean()), float(norms_N[far].square().sum() / norms_N.square().sum())
    where = ""
    if sample.rows.positions_N is not None:
        positions = sample.rows.positions_N[sample.rows.keep_N][far.cpu()]
        where = f", {float((positions == 0).float().mean()):.0%} of them at position 0"
    fix = "data.train.exclude: [bos, pad], or the token ids of these sinks: they would dominate the loss"
    yield Check("norms", "warning", f"{words}; {share:.2%} of the rows are {SINK:.0f} times the median or more and carry {weight:.0%} of the square norm{where}", fix)


def _normalisation(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    x_ND, how = sample.kept(site), sample.settings.get("normalize", "none")
    ratio = float(x_ND.norm(dim=1).mean()) / math.sqrt(x_ND.shape[1])
    if how == "none" and not 1 / NORM_APART <= ratio <= NORM_APART:
        yield Check("normalisation", "warning", f"the mean norm is {ratio:.3g} √d and nothing is normalised: learning rates are tuned for √d", "extract.normalize: sqrt_d")
    else:
        yield Check("normalisation", "ok", f"mean norm {ratio:.3g} √d, normalize: {how}")


# ---------------------------------------------------------------------- the tensor
def _tensor(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    if model is None or sample.tokens_BT is None:
        yield Check("the tensor", "skipped", "activations from files: nothing to compare them with")
        return
    yield Check(*tensor.identify(site, *sample.few(site), model))


def _splice(site: str, sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    if model is None or sample.tokens_BT is None or getattr(model.hf, "get_output_embeddings", lambda: None)() is None:
        yield Check("splicing back", "skipped", "no language-modelling head: there are no logits to compare")
        return
    yield Check(*tensor.splice_back(site, *sample.few(site), model))


# ---------------------------------------------------------------------- the stream
def _padding(sample: Sample, model: ModelHandle | None) -> Iterator[Check]:
    ids_N = sample.rows.token_ids_N
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if ids_N is None or pad is None:
        yield Check("padding", "skipped", "the tokenizer has no padding token" if ids_N is not None else "the rows carry no token ids")
        return
    other = {getattr(model.tokenizer, name, None) for name in ("eos_token_id", "bos_token_id", "unk_token_id")}
    leaked = int((ids_N[sample.rows.keep_N] == pad).sum())
    if leaked and pad not in other:  # many tokenizers pad with a token that text uses too
        yield Check("padding", "failed", f"{leaked:,} of the rows kept are padding", "data.train.exclude: [bos, pad]")
    else:
        yield Check("padding", "ok", "no padding among the rows kept")


def _order(sample: Sample) -> Iterator[Check]:
    order, batch = sample.order, sample.settings.get("batch") or 0
    if order is None:
        yield Check("shuffled", "skipped", "nothing is trained here, or rows come without sequences")
        return
    words = (
        f"of {order.pairs:,} consecutive rows in the first block, {order.same:.2%} come from one sequence ({order.same_expected:.2%} in a random order) and "
        f"{order.beside:.2%} from sequences side by side in the text ({order.beside_expected:.2%})"
    )
    if order.ordered():
        yield Check("shuffled", "failed", words, "report this: the order of the stream is the hub's own, and it is not random here")
    elif order.pieces < FEW_SEQUENCES and order.text > order.pieces:
        fix = f"extract.block: {FEW_SEQUENCES * 4 * sample.settings['context']}"
        yield Check("shuffled", "warning", f"a block holds {order.pieces} sequences: a batch of {batch:,} has about {order.in_batch:.0f} rows of each", fix)
    elif order.pieces < FEW_SEQUENCES:
        yield Check("shuffled", "warning", f"the whole training text is {order.text} sequences: a batch of {batch:,} has about {order.in_batch:.0f} rows of each", "data.train: more text")
    else:
        yield Check("shuffled", "ok", f"{words}; a batch of {batch:,} has {order.in_batch:.1f} rows of each of its sequences")
