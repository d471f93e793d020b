"""Two runs in; which SAE of the first is compared with which of the second, and sentences about how that was found, out.

SAEs of one id belong together, and so do those that the user maps. Of the others two are paired where they are alike and nothing else is
like them: first by architecture, widths, sites and sparsity with trainer and seed, then without these two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saehub.errors import UsageError, did_you_mean
from saehub.report.run_folder import RunFolder

SPARSITY = ("k", "target_l0", "sparsity")
"""Settings of trainers that say how sparse an SAE is to be; the first that is there counts."""


def pair(left: RunFolder, right: RunFolder, mapped: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """`{id in the first run: id in the second}` for all ids that differ and belong together, and what to tell about it.

    `mapped` holds `A=B`, as given by the user. Raises UsageError where one names no SAE, or one SAE twice.
    """
    ours, theirs = _ids(left), _ids(right)
    found = _given(mapped, ours, theirs)
    remarks: list[str] = []
    if not found and len(ours) == len(theirs) == 1 and ours != theirs:
        return {ours[0]: theirs[0]}, []  # one SAE each: there is nothing to choose
    for detail in (True, False):
        for a, b in _alike(left, right, *_open(found, ours, theirs), detail=detail):
            found[a] = b
            remarks.append(f"{a} is compared with {b}: both are {_words(left, a)}, and no other is; another choice: --map {a}=ID")
    free_a, free_b = _open(found, ours, theirs)
    if free_a and free_b:
        remarks.append(
            f"not compared: {', '.join(free_a)} of the first run, {', '.join(free_b)} of the second. Their ids differ, and which of them belong "
            f"together does not follow from architecture, width, site and sparsity. To say it: --map {free_a[0]}={free_b[0]}"
        )
    return found, remarks


def _ids(run: RunFolder) -> list[str]:
    return list(dict.fromkeys(name for item in run.measurements for name in item.subjects))


def _given(mapped: Iterable[str], ours: list[str], theirs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for words in mapped:
        a, sign, b = words.partition("=")
        if not sign:
            raise UsageError(f"--map {words} is no pair", fix="--map ID_IN_THE_FIRST=ID_IN_THE_SECOND, such as --map native-k32=mine-k32")
        for name, known, which in ((a, ours, "first"), (b, theirs, "second")):
            if name not in known:
                raise UsageError(f"--map {words}: the {which} run has no SAE {name!r}{did_you_mean(name, known)}", why=f"it has {', '.join(known) or 'none'}")
        if a in found or b in found.values():
            raise UsageError(f"--map {words}: {a if a in found else b} is already paired", fix="each SAE once")
        found[a] = b
    return found


def _open(found: Mapping[str, str], ours: list[str], theirs: list[str]) -> tuple[list[str], list[str]]:
    """The ids of either side that have no partner yet; equal ids are partners unless one of them is mapped elsewhere."""
    taken = set(found.values())
    same = {name for name in ours if name in theirs and name not in found and name not in taken}
    return [name for name in ours if name not in found and name not in same], [name for name in theirs if name not in taken and name not in same]


def _alike(left: RunFolder, right: RunFolder, ours: list[str], theirs: list[str], *, detail: bool) -> list[tuple[str, str]]:
    def by_look(run: RunFolder, names: list[str]) -> dict[tuple, list[str]]:
        looks: dict[tuple, list[str]] = {}
        for name in names:
            look = _look(run, name, detail)
            if look is not None:
                looks.setdefault(look, []).append(name)
        return looks

    first, second = by_look(left, ours), by_look(right, theirs)
    return [(names[0], second[look][0]) for look, names in first.items() if len(names) == 1 and len(second.get(look, ())) == 1]


def _look(run: RunFolder, name: str, detail: bool) -> tuple | None:
    """What two SAEs must share; None where the run does not say (results of another library)."""
    sae = (run.card.get("saes") or {}).get(name)
    if not sae or not sae.get("architecture"):
        return None
    from_where = sae.get("provenance") or {}
    look = (sae["architecture"], sae.get("kind"), sae.get("d_in"), sae.get("d_out"), sae.get("d_sae"), from_where.get("site"), from_where.get("target_site"))
    seed = (from_where.get("trainer") or {}).get("seed")
    return (*look, _sparsity(sae), *((sae.get("trainer"), seed) if detail else ()))


def _sparsity(sae: Mapping[str, Any]) -> tuple[str, float] | None:
    settings = {**(sae.get("config") or {}), **(sae.get("params") or {})}
    return next(((key, settings[key]) for key in SPARSITY if isinstance(settings.get(key), (int, float))), None)


def _words(run: RunFolder, name: str) -> str:
    sae = run.card["saes"][name]
    sparsity = _sparsity(sae)
    site = (sae.get("provenance") or {}).get("site")
    words = [str(sae["architecture"]), f"{sae.get('d_sae'):,} latents" if sae.get("d_sae") else "", site or ""]
    return ", ".join([*filter(None, words), *([f"{sparsity[0]} {sparsity[1]:g}"] if sparsity else [])])
