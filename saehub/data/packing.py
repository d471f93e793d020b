"""Documents and a tokenizer in; packed sequences of one length, drawn from several sources by weight, out.

Text becomes tokens without special tokens; documents are put end to end, and the stream is cut into sequences.

    bos = sequence   every sequence is BOS + context - 1 tokens; documents are parted by EOS where the tokenizer has one
    bos = document   BOS before every document, nothing else
    bos = none       as `sequence`, without BOS
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from saehub.data.sources import Document, open_source
from saehub.errors import StageFailed, UsageError
from saehub.seeds import derive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from saehub.recipe.schema import SourceEntry

_SPECIAL = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
_DOCUMENTS_A_CALL = 64  # to the tokenizer, which works on them in parallel


@dataclass(frozen=True)
class TokenPolicy:
    """How text becomes sequences, and which of their tokens never reach a trainer."""

    context: int = 128
    """Tokens a sequence, BOS included."""
    bos: str = "sequence"
    """`sequence`, `document` or `none`."""
    exclude: tuple[str | int, ...] = ("bos", "pad")
    """Tokens whose rows are dropped: bos, eos, pad, unk, cls, sep, mask (those that the tokenizer has), a token's text, or an id."""
    template: str | None = None
    """`chat`: conversations go through the tokenizer's chat template, plain text as one user turn. None: as it stands."""


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS, or CLS where an encoder's tokenizer has that instead."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """EOS, or SEP."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def excluded_ids(policy: TokenPolicy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The sorted ids of `policy.exclude`; UsageError for a token or id that the vocabulary lacks."""
    ids: set[int] = set()
    size = len(tokenizer)
    for item in policy.exclude:
        if isinstance(item, int):
            if not 0 <= item < size:
                raise UsageError(
                    f"exclude: token id {item} is outside the vocabulary",
                    why=f"it has {size} tokens",
                    where="data.train.exclude",
                    fix="correct the id",
                )
            ids.add(item)
        elif item in _SPECIAL:
            found = bos_id(tokenizer) if item == "bos" else eos_id(tokenizer) if item == "eos" else getattr(tokenizer, f"{item}_token_id")
            ids.update(() if found is None else (found,))
        else:
            found = tokenizer.get_vocab().get(item)
            if found is None:
                raise UsageError(
                    f"exclude: the tokenizer has no token {item!r}",
                    where="data.train.exclude",
                    fix=f"use {', '.join(_SPECIAL)}, a token's exact text, or an id",
                )
            ids.add(found)
    return sorted(ids)


def check_policy(policy: TokenPolicy, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
    """UsageError where the policy cannot be followed with this tokenizer, or exceeds the model's `limit` of positions."""
    if policy.bos not in ("sequence", "document", "none"):
        raise UsageError(f"bos: {policy.bos!r} is not known", where="data.train.bos", fix="use sequence, document or none")
    if policy.context < (2 if policy.bos == "sequence" else 1):
        raise UsageError(f"context: {policy.context} leaves no room for text", where="data.train.context", fix="use at least 2")
    if limit is not None and policy.context > limit:
        raise UsageError(
            f"context: {policy.context} is longer than the model allows",
            why=f"it accepts {limit} positions",
            where="data.train.context",
            fix=f"use at most {limit}",
        )
    if policy.bos != "none" and bos_id(tokenizer) is None:
        raise UsageError(f"bos: {policy.bos}, but the tokenizer has no BOS token", where="data.train.bos", fix="write `bos: none`")
    if policy.template not in (None, "chat"):
        raise UsageError(f"template: {policy.template!r} is not known", where="data.train.template", fix="use chat, or leave it out")
    if policy.template == "chat" and not tokenizer.chat_template:
        raise UsageError(
            "template: chat, but the tokenizer has no chat template",
            where="data.train.template",
            fix="use an instruct model's tokenizer, or leave template out",
        )


class Packer:
    """One source as a queue of sequences; begins again when it is told to.

    Documents are mixed in a window of about `window` characters, seeded, so that files sorted by name do not train in that order.
    """

    def __init__(
        self,
        entry: SourceEntry,
        tokenizer: PreTrainedTokenizerBase,
        policy: TokenPolicy,
        seed: int,
        window: int,
        tick: Callable[[], None] = lambda: None,
    ):
        self.entry, self.tokenizer, self.policy, self.seed, self.window = entry, tokenizer, policy, seed, window
        self.tick = tick
        """Called now and then while documents are read, so that reading can be watched and stopped."""
        self.passes = self.documents = self.tokens = self.sequences = 0
        self.length = policy.context - (policy.bos == "sequence")
        self.reserved: set[int] = set()
        """Documents that later passes leave out (their tokens are calibration rows)."""
        self._read: list[int] | None = []  # documents of the first pass, while they may still be reserved
        self._buffer: list[int] = []
        self._start = 0  # what stands before it in the buffer is used up
        self._ids = self._tokens_of_documents()
        self.ended = False

    def next(self) -> list[int] | None:
        """The next `context` token ids, or None when the source has ended."""
        while len(self._buffer) - self._start < self.length:
            ids = next(self._ids, None)
            if ids is None:
                self.ended = True
                return None
            self._buffer = self._buffer[self._start :] + ids
            self._start = 0
        ids = self._buffer[self._start : self._start + self.length]
        self._start += self.length
        self.sequences += 1
        self.tokens += self.length
        return [bos_id(self.tokenizer), *ids] if self.policy.bos == "sequence" else ids

    def reserve(self) -> None:
        """Keep every document that was read so far out of later passes; called once, when calibration rows are drawn."""
        self.reserved.update(self._read or ())
        self._read = None

    def restart(self) -> None:
        """Begin another pass, in another order."""
        self._ids, self.ended = self._tokens_of_documents(), False

    def _tokens_of_documents(self) -> Iterator[list[int]]:
        number = self.passes
        self.passes += 1
        documents = self._shuffled(enumerate(open_source(self.entry)), number)
        bos, eos = bos_id(self.tokenizer), eos_id(self.tokenizer)
        chat = self.policy.template == "chat"
        any_token = False
        while batch := list(islice(documents, _DOCUMENTS_A_CALL)):
            texts = [self._render(document) for _, document in batch]
            for (index, _), ids in zip(batch, self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
                if chat and ids and ids[0] == bos:
                    ids = ids[1:]  # the template writes one; the policy decides
                if not ids:
                    continue
                if self._read is not None:
                    self._read.append(index)
                self.documents += 1
                any_token = True
                if self.policy.bos == "document":
                    yield [bos, *ids]
                else:
                    yield ids if chat or eos is None else [*ids, eos]
        if not any_token:
            raise StageFailed(
                f"source {self.entry.source!r} gives no tokens" + (f" in pass {number + 1}" if number else ""),
                where="data",
                why="every document is reserved for calibration" if number else None,
                fix="give more text, or lower extract.calibration",
            )

    def _shuffled(self, documents: Iterator[tuple[int, Document]], number: int) -> Iterator[tuple[int, Document]]:
        """A window shuffle: each step gives out a random document of the window and takes in the next of the source."""
        draw = random.Random(derive("documents", self.seed, number)).random  # the one method whose stream is fixed for all versions
        held: list[tuple[int, Document]] = []
        size = 0
        for item in documents:
            if item[0] in self.reserved:
                continue
            held.append(item)
            size += _size(item[1])
            if len(held) % _DOCUMENTS_A_CALL == 0:
                self.tick()
            while size > self.window and len(held) > 1:
                item = _take(held, draw)
                size -= _size(item[1])
                yield item
        while held:
            yield _take(held, draw)

    def _render(self, document: Document) -> str:
        if self.policy.template != "chat":
            if not document.text:
                raise UsageError(
                    f"source {self.entry.source!r} holds conversations, not text",
                    where="data.train.template",
                    fix="write `template: chat`, or set `field:`",
                )
            return document.text
        messages = list(document.messages) or [{"role": "user", "content": document.text}]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like, for instance about the order of roles
            raise StageFailed(
                f"the chat template refuses a conversation of {self.entry.source!r}",
                why=f"it begins with {str(messages[0])[:100]}",
                said=str(error),
                fix="correct the roles of its messages",
            ) from error


def _take(held: list, draw: Callable[[], float]):
    chosen = int(draw() * len(held))
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()


def _size(document: Document) -> int:
    return len(document.text) + sum(len(message["content"]) for message in document.messages)


def pick(weights: Sequence[float], counts: Sequence[int]) -> int:
    """The source whose share lags most: argmax of w_s * (n + 1) - n_s, the first at a tie. No source is ever a whole sequence ahead of its weight."""
    n = sum(counts)
    return max(range(len(weights)), key=lambda s: (weights[s] * (n + 1) - counts[s], -s))
