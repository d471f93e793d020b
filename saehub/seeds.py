"""Any names and numbers in, one 63-bit seed out: every random choice in saehub is derived from ids, never from global state."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(*parts: object) -> int:
    """A 63-bit seed: the leading bits of the SHA-256 of the JSON list of `parts` (strings, numbers, lists)."""
    digest = hashlib.sha256(json.dumps(list(parts), separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU `torch.Generator` seeded with `derive(*parts)`."""
    import torch

    return torch.Generator(device="cpu").manual_seed(derive(*parts))
