"""Two lists of measurements (or the SAEs of one) in; differences with intervals out, ranked only where the data can tell them apart.

On shared sequences the difference is bootstrapped in pairs (Efron & Tibshirani 1993, §8): the same resampled sequences for both SAEs,

    Δ* = R_b(S*) - R_a(S*),   R(S) = Σ_S num / Σ_S den,   S* a draw of n sequences with replacement,

its 95 % interval the 2.5 and 97.5 % quantiles of Δ*, its p-value twice the smaller share of Δ* on one side of 0. Where several pairs of
SAEs are compared in one metric on one dataset, p-values are adjusted over these pairs (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from math import erfc, sqrt
from typing import TYPE_CHECKING, Any

from saehub.api import Measurement

if TYPE_CHECKING:
    import numpy as np

DRAWS = 9_999
"""Bootstrap resamples (fewer where sequences are so many that they would not fit `DRAW_CELLS`)."""
DRAW_CELLS = 20_000_000
LEVEL = 0.05
Z95 = 1.959964
"""Half width of a 95 % normal interval, in standard errors."""
PARTS = (("numerator", "denominator"), ("numerators", "denominators"))
"""Where an evaluator keeps the per-sequence sums of a ratio, in `Measurement.parts`."""


@dataclass(frozen=True)
class Difference:
    """One metric of one SAE on one dataset, in two runs."""

    metric: str
    dataset: str | None
    evaluator: str
    definition: str
    better: str
    subjects_a: tuple[str, ...]
    subjects_b: tuple[str, ...]
    a: float | None
    b: float | None
    stderr_a: float | None
    stderr_b: float | None
    delta: float | None
    """b - a."""
    stderr: float | None
    """Standard error of `delta`."""
    paired: bool
    """Whether `stderr` is from differences on the same sequences (it is then smaller)."""
    verdict: str
    """`a better`, `b better`, `equal`, `not ranked` or `not comparable`."""
    reason: str
    """Why there is no ranking; empty where there is one."""
    ci_low: float | None = None
    """95 % interval of `delta`: from the paired bootstrap, else ± 1.96 standard errors."""
    ci_high: float | None = None
    p: float | None = None
    """Two-sided p-value of `delta` = 0, adjusted (Holm) over `family` pairs."""
    family: int = 1
    """Pairs of SAEs that were compared in this metric on this dataset."""


def compare(left: Sequence[Measurement], right: Sequence[Measurement], pairs: Mapping[str, str] | None = None) -> tuple[list[Difference], list[str]]:
    """Differences of all numbers that both sides have, and sentences about what only one side has.

    SAEs are matched by id, but for `pairs`, `{id on the left: id on the right}`. Without `pairs`, where each side has exactly one SAE, those
    two are compared under whatever ids.
    """
    left = _same_text(left, right)
    rename = _match(left, right) if pairs is None else _one_to_one(pairs)
    others = {_key(item, {}): item for item in right}
    found, used = [], set()
    for item in left:
        key = _key(item, rename)
        if key in others:
            used.add(key)
            found.append(difference(item, others[key]))
    found = _adjusted(found)
    alone = [
        ("the first run", [item for item in left if _key(item, rename) not in others]),
        ("the second run", [others[key] for key in others if key not in used]),
    ]
    remarks = _other_sparsity(found)
    for side, items in alone:
        if items:
            remarks.append(f"only in {side}: {_listed(items)}")
    return found, remarks


def _listed(items: Sequence[Measurement]) -> str:
    """`x: fvu, x: l0`; of an SAE with more than three metrics, `x: fvu, mse and 24 more`."""
    by_sae: dict[str, dict[str, None]] = {}
    for item in items:
        by_sae.setdefault("+".join(item.subjects) or "-", {})[item.metric] = None
    return ", ".join(
        f"{sae}: {metric}" if len(metrics) <= 3 else f"{sae}: {', '.join(list(metrics)[:2])} and {len(metrics) - 2} more"
        for sae, metrics in by_sae.items()
        for metric in (metrics if len(metrics) <= 3 else (None,))
    )


def within(measurements: Sequence[Measurement]) -> tuple[list[Difference], list[str]]:
    """Differences between all pairs of SAEs of one list that were measured at the same site; sentences about pairs of other L0.

    Numbers about several SAEs at once, and those of SAEs at different sites, are not compared.
    """
    by_question: dict[tuple, list[Measurement]] = {}
    for item in measurements:
        if len(item.subjects) == 1:
            by_question.setdefault((item.site, item.dataset, item.evaluator, item.metric), []).append(item)
    ids = list(dict.fromkeys(item.subjects for items in by_question.values() for item in items))
    found = [difference(a, b) for items in by_question.values() for a, b in combinations(items, 2)]
    found.sort(key=lambda item: (ids.index(item.subjects_a), ids.index(item.subjects_b)))  # stable: metrics keep their order
    found = _adjusted(found)
    return found, [text.replace(" in the first run", " in the first").replace(" in the second run", " in the second") for text in _other_sparsity(found)]


def _adjusted(found: list[Difference]) -> list[Difference]:
    """Holm's step-down over the pairs of each (metric, dataset, evaluator): the i-th smallest of m p-values times m - i + 1, never falling."""
    families: dict[tuple, list[int]] = {}
    for index, item in enumerate(found):
        if item.p is not None:
            families.setdefault((item.metric, item.dataset, item.evaluator), []).append(index)
    out = list(found)
    for members in families.values():
        largest, m = 0.0, len(members)
        for rank, index in enumerate(sorted(members, key=lambda i: found[i].p)):
            item = found[index]
            largest = max(largest, min(1.0, (m - rank) * item.p))
            changed = {"p": largest, "family": m}
            if item.verdict in ("a better", "b better") and largest > LEVEL:
                changed |= {"verdict": "not ranked", "reason": f"p = {largest:.2g} after Holm's adjustment over {m} pairs"}
            out[index] = replace(item, **changed)
    return out


def _other_sparsity(found: Sequence[Difference]) -> list[str]:
    """A sentence for each pair of SAEs whose L0 differ by more than 5 %: what is better then may only be what is less sparse."""
    told: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    for item in found:
        if item.metric == "l0" and item.a and item.delta is not None and abs(item.delta) > 0.05 * abs(item.a):
            names = " and ".join(dict.fromkeys(("+".join(item.subjects_a), "+".join(item.subjects_b))))
            told.setdefault(
                (item.subjects_a, item.subjects_b),
                f"{names}: L0 is {item.a:.4g} in the first run and {item.b:.4g} in the second; "
                "a better reconstruction may be bought with it",
            )
    return list(told.values())


def _key(item: Measurement, rename: Mapping[str, str]) -> tuple:
    return (tuple(rename.get(name, name) for name in item.subjects), item.dataset, item.evaluator, item.metric)


def _same_text(left: Sequence[Measurement], right: Sequence[Measurement]) -> Sequence[Measurement]:
    """`left` with the other side's name of a dataset, for evaluators of which each side has one, and one side does not know its hash: published
    results name text that saehub knows by another name."""
    names: dict[str, str | None] = {}
    for evaluator in {item.evaluator for item in left}:
        ours = {(item.dataset, item.dataset_hash) for item in left if item.evaluator == evaluator and item.dataset}
        theirs = {(item.dataset, item.dataset_hash) for item in right if item.evaluator == evaluator and item.dataset}
        if len(ours) == len(theirs) == 1 and (not next(iter(ours))[1] or not next(iter(theirs))[1]):
            names[evaluator] = next(iter(theirs))[0]
    return [replace(item, dataset=names[item.evaluator]) if item.dataset and item.evaluator in names else item for item in left]


def _match(left: Iterable[Measurement], right: Iterable[Measurement]) -> dict[str, str]:
    ours = {name for item in left for name in item.subjects}
    theirs = {name for item in right for name in item.subjects}
    if len(ours) == len(theirs) == 1 and ours != theirs:
        return {ours.pop(): theirs.pop()}
    return {}


def _one_to_one(pairs: Mapping[str, str]) -> dict[str, str]:
    """`pairs`, and another name for each id on the left that is the partner of another one."""
    return {**{name: f"{name} (first)" for name in pairs.values()}, **pairs}


def difference(a: Measurement, b: Measurement) -> Difference:
    """b - a, its standard error and interval, and who is better, if that can be said.

    Paired (same text, per-sequence parts on both sides): the paired bootstrap, and a ranking only where its 95 % interval leaves out zero.
    Unpaired: se = sqrt(se_a^2 + se_b^2), and a ranking only where the two 95 % intervals do not overlap.
    """
    delta = b.value - a.value if a.value is not None and b.value is not None else None
    stderr = p = low = high = None
    gaps_R = _bootstrap(a, b) if delta is not None else None
    if gaps_R is not None:
        import numpy as np

        low, high = (float(q) for q in np.quantile(gaps_R, (0.025, 0.975)))
        stderr, n = float(gaps_R.std(ddof=1)), len(gaps_R)
        p = min(1.0, 2 * (1 + min(int((gaps_R <= 0).sum()), int((gaps_R >= 0).sum()))) / (n + 1))
    elif delta is not None and a.stderr is not None and b.stderr is not None:
        stderr = sqrt(a.stderr**2 + b.stderr**2)
        low, high = delta - Z95 * stderr, delta + Z95 * stderr
        p = erfc(abs(delta) / stderr / sqrt(2)) if stderr else float(delta == 0)
    verdict, reason = _verdict(a, b, delta, (low, high) if gaps_R is not None else None)
    return Difference(
        a.metric, a.dataset, a.evaluator, a.definition, a.better, a.subjects, b.subjects,
        a.value, b.value, a.stderr, b.stderr, delta, stderr, gaps_R is not None, verdict, reason, low, high,
        None if verdict == "not comparable" else p,
    )  # fmt: skip


def _verdict(a: Measurement, b: Measurement, delta: float | None, paired: tuple[float, float] | None) -> tuple[str, str]:
    if a.definition != b.definition:
        return "not comparable", f"two definitions: {a.definition} and {b.definition}"
    if delta is None:
        missing = {which: item.reason or "not measured" for which, item in (("the first", a), ("the second", b)) if item.value is None}
        if len(missing) == 2 and a.reason == b.reason:
            return "not comparable", f"neither has a value: {missing['the first']}"
        return "not comparable", "; ".join(f"{which} has no value: {reason}" for which, reason in missing.items())
    if a.dataset_hash and b.dataset_hash and a.dataset_hash != b.dataset_hash:
        return "not comparable", "measured on different text (the dataset hashes differ)"
    if delta == 0:
        return "equal", ""
    if a.better not in ("higher", "lower"):
        return "not ranked", "neither direction is better"
    if paired:
        if paired[0] <= 0 <= paired[1]:
            return "not ranked", "the 95 % interval of the paired difference holds zero"
    else:
        intervals = _interval(a), _interval(b)
        if None in intervals:
            return "not ranked", "no standard error on " + ("either side" if intervals == (None, None) else "one side")
        (low_a, high_a), (low_b, high_b) = intervals  # type: ignore[misc]
        if low_a <= high_b and low_b <= high_a:
            return "not ranked", "the 95 % intervals overlap"
    return ("b better" if (delta > 0) == (a.better == "higher") else "a better"), ""


def _interval(item: Measurement) -> tuple[float, float] | None:
    if item.ci_low is not None and item.ci_high is not None:
        return item.ci_low, item.ci_high
    if item.stderr is None or item.value is None:
        return None
    return item.value - Z95 * item.stderr, item.value + Z95 * item.stderr


@lru_cache(maxsize=4)
def _draws(n: int) -> np.ndarray:
    """How often each of n sequences is drawn, float64 [draws, n]: the same draws for every metric, and every time."""
    import numpy as np

    draws = max(999, min(DRAWS, DRAW_CELLS // n))
    chosen = np.random.default_rng(n).integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


def _bootstrap(a: Measurement, b: Measurement) -> np.ndarray | None:
    """R_b - R_a on each resample of the sequences that they share, float64 [draws].

    None unless both sides keep the parts of the same text, these parts reproduce the values (or 1 - value), and no resample has an empty
    denominator.
    """
    import numpy as np

    if not a.dataset_hash or a.dataset_hash != b.dataset_hash or a.definition != b.definition:
        return None
    left, right = _ratio(a), _ratio(b)
    if left is None or right is None or len(left[1]) != len(right[1]) or len(left[1]) < 2:
        return None
    sums_R4 = _draws(len(left[1])) @ np.stack([left[1], left[2], right[1], right[2]], 1)
    if not (np.abs(sums_R4[:, [1, 3]]) > 0).all():
        return None
    return right[0] * sums_R4[:, 2] / sums_R4[:, 3] - left[0] * sums_R4[:, 0] / sums_R4[:, 1] + ((right[0] < 0) - (left[0] < 0))


def _ratio(item: Measurement) -> tuple[float, Any, Any] | None:
    """(sign, numerators, denominators): the value is their ratio (sign 1) or 1 minus it (sign -1)."""
    import numpy as np

    sums = _sums(item.parts)
    if sums is None or item.value is None:
        return None
    top, bottom = (np.asarray(part, dtype=np.float64) for part in sums)
    if bottom.sum() == 0:
        return None
    ratio, near = float(top.sum() / bottom.sum()), 1e-6 * max(1.0, abs(item.value))
    if abs(ratio - item.value) <= near:
        return 1.0, top, bottom
    return (-1.0, top, bottom) if abs(1 - ratio - item.value) <= near else None


def _sums(parts: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    for top, bottom in PARTS:
        if isinstance(parts.get(top), list) and isinstance(parts.get(bottom), list) and len(parts[top]) == len(parts[bottom]):
            return parts[top], parts[bottom]
    return None
