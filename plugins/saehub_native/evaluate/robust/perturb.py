"""A text in; the same content put differently (six deterministic ways), or a user's pairs from a file, out. Torch-free."""

from __future__ import annotations

import json
import re
from pathlib import Path

from saehub.errors import FormatError, UsageError
from saehub.seeds import derive

CONTRACTIONS = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "is not": "isn't", "are not": "aren't", "was not": "wasn't", "were not": "weren't",
    "cannot": "can't", "could not": "couldn't", "should not": "shouldn't", "would not": "wouldn't", "will not": "won't", "has not": "hasn't",
    "have not": "haven't", "it is": "it's", "that is": "that's", "there is": "there's", "you are": "you're", "we are": "we're", "they are": "they're",
    "I am": "I'm", "let us": "let's",
}  # fmt: skip
SYNONYMS = {
    "use": "employ", "used": "employed", "return": "give back", "returns": "gives back", "begin": "start", "start": "begin", "end": "finish", "big": "large",
    "large": "big", "small": "little", "fast": "quick", "quick": "fast", "also": "too", "but": "yet", "get": "obtain", "show": "display", "shows": "displays",
    "make": "create", "create": "make", "help": "assist", "need": "require", "needs": "requires", "many": "numerous", "error": "mistake", "way": "manner",
    "often": "frequently", "about": "concerning", "whole": "entire", "value": "quantity", "example": "instance", "if": "provided", "whether": "if",
    "change": "alter", "given": "supplied", "current": "present", "new": "fresh", "number": "count", "list": "sequence", "same": "identical", "each": "every",
}  # fmt: skip


def perturb(text: str, how: str, seed: int) -> str:
    """`text` put differently; the same text where there is nothing to change."""
    return _WAYS[how](text, seed)


def _case(text: str, seed: int) -> str:
    return text.lower()


def _spacing(text: str, seed: int) -> str:
    return re.sub(r"\s+", " ", text)


def _punctuation(text: str, seed: int) -> str:
    return re.sub(r"[.,;:!?\"'`()\[\]{}]", "", text)


def _typos(text: str, seed: int) -> str:
    """One word of ten with four or more letters has two inner neighbours swapped."""
    count = 0

    def swap(found: re.Match) -> str:
        nonlocal count
        word, count = found[0], count + 1
        if derive("typo", seed, count) % 10:
            return word
        at = 1 + derive("where", seed, count) % (len(word) - 3)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(r"[A-Za-z]{4,}", swap, text)


def _contractions(text: str, seed: int) -> str:
    """Long forms become short, and short ones long."""
    shorter = {**CONTRACTIONS, **{short: long for long, short in CONTRACTIONS.items()}}
    return _replaced(text, shorter)


def _synonyms(text: str, seed: int) -> str:
    return _replaced(text, SYNONYMS)


def _replaced(text: str, table: dict[str, str]) -> str:
    pattern = r"(?<![\w'])(" + "|".join(re.escape(word) for word in sorted(table, key=len, reverse=True)) + r")(?![\w'])"
    lower = {word.lower(): other for word, other in table.items()}

    def other(found: re.Match) -> str:
        word = lower[found[0].lower()]
        return word[0].upper() + word[1:] if found[0][0].isupper() else word

    return re.sub(pattern, other, text, flags=re.IGNORECASE)


_WAYS = {
    "case": _case,
    "spacing": _spacing,
    "punctuation": _punctuation,
    "typos": _typos,
    "contractions": _contractions,
    "synonyms": _synonyms,
}


def read_pairs(path: str, most: int) -> list[tuple[str, str]]:
    """The first `most` pairs of a .jsonl file of {"text", "paraphrase"}; FormatError names the line that is none, UsageError a missing file."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{path} does not exist", where="with.pairs", fix='a .jsonl file with {"text": …, "paraphrase": …} on each line')
    found: list[tuple[str, str]] = []
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                pair = (data["text"], data["paraphrase"])
                if not all(isinstance(one, str) and one.strip() for one in pair):
                    raise ValueError("both must be texts that are not empty")
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{path}:{number} is not a pair", why=f"{type(error).__name__}: {error}", fix='{"text": …, "paraphrase": …}') from error
            found.append(pair)
            if len(found) == most:
                break
    if len(found) < 2:
        raise UsageError(f"{path} holds {len(found)} pairs", why="an error needs at least two", where="with.pairs", fix="more lines")
    return found
