"""Any words in; the same words without what could steer a terminal, break a page or reverse the line out."""

from __future__ import annotations

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(words: object) -> str:
    """`words` with control characters, direction marks and broken code points made visible (`\\x1b`); tabs and newlines stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(words))
