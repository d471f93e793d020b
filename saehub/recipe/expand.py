"""A recipe with sweeps in; the same recipe with one train entry for every combination out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from saehub.recipe.schema import Recipe, TrainEntry, UseEntry

ENTRY_KEYS = ("seed", "site")  # swept keys that are fields of the entry; all others are settings under `with`
MAX_MEMBERS = 256


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, int]]]:
    """Every combination as (suffix of the id, key -> index of its value), the last key varying fastest."""
    members = []
    for indices in itertools.product(*(range(len(values)) for values in sweep.values())):
        chosen = dict(zip(sweep, indices))
        members.append(("".join(f"-{_label(key, sweep[key][index], index)}" for key, index in chosen.items()), chosen))
    return members


def _label(key: str, value: Any, index: int) -> str:
    """`k16`, `seed1`, `lr0.001`, `resid_post.4`; lists and maps go by their index."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    else:
        text = str(value) if isinstance(value, (str, int, float)) and len(str(value)) <= 60 else str(index)
    return slug(text) if key == "site" else f"{slug(key)}{slug(text)}"


def slug(text: str) -> str:
    """Text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)


def expand_sweeps(recipe: Recipe) -> Recipe:
    """One entry for every combination of a `sweep`, with ids such as `topk-k16-seed1`.

    A `saes:` filter that names the id of a sweep then names all its members."""
    entries: list[TrainEntry] = []
    members: dict[str, tuple[str, ...]] = {}
    for entry in recipe.train:
        if entry.sweep is None:
            entries.append(entry)
            continue
        made = []
        for suffix, chosen in combinations(entry.sweep):
            values = {key: entry.sweep[key][index] for key, index in chosen.items()}
            own = {key: value for key, value in values.items() if key in ENTRY_KEYS}
            settings = {**entry.with_, **{key: value for key, value in values.items() if key not in ENTRY_KEYS}}
            made.append(replace(entry, id=entry.id + suffix, with_=settings, sweep=None, **own))
        entries += made
        members[entry.id] = tuple(item.id for item in made)
    return _with_entries(recipe, entries, members)


def _with_entries(recipe: Recipe, entries: list[TrainEntry], members: dict[str, tuple[str, ...]]) -> Recipe:
    def widen(use: UseEntry) -> UseEntry:
        if use.saes is None:
            return use
        return replace(use, saes=tuple(dict.fromkeys(name for item in use.saes for name in members.get(item, (item,)))))

    return replace(recipe, train=tuple(entries), evaluate=tuple(map(widen, recipe.evaluate)), export=tuple(map(widen, recipe.export)))
