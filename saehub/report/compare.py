"""Two lists of measurements in; differences with standard errors out, ranked only where the data can tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from saehub.api import Measurement

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


def compare(left: Sequence[Measurement], right: Sequence[Measurement]) -> tuple[list[Difference], list[str]]:
    """Differences of all numbers that both sides have, and sentences about what only one side has.

    SAEs are matched by id; where each side has exactly one SAE, those two are compared under whatever ids.
    """
    rename = _match(left, right)
    others = {_key(item, {}): item for item in right}
    found, used = [], set()
    for item in left:
        key = _key(item, rename)
        if key in others:
            used.add(key)
            found.append(difference(item, others[key]))
    alone = [
        ("the first run", [item for item in left if _key(item, rename) not in others]),
        ("the second run", [others[key] for key in others if key not in used]),
    ]
    remarks = _other_sparsity(found)
    for side, items in alone:
        if items:
            names = ", ".join(dict.fromkeys(f"{'+'.join(item.subjects) or '-'}: {item.metric}" for item in items))
            remarks.append(f"only in {side}: {names if len(names) <= 300 else names[:297] + '…'}")
    return found, remarks


def _other_sparsity(found: Sequence[Difference]) -> list[str]:
    """A sentence for each pair of SAEs whose L0 differ by more than 5 %: what is better then may only be what is less sparse."""
    told: dict[tuple[str, ...], str] = {}
    for item in found:
        if item.metric == "l0" and item.a and item.delta is not None and abs(item.delta) > 0.05 * abs(item.a):
            names = " and ".join(dict.fromkeys(("+".join(item.subjects_a), "+".join(item.subjects_b))))
            told.setdefault(
                item.subjects_a,
                f"{names}: L0 is {item.a:.4g} in the first run and {item.b:.4g} in the second; "
                "a better reconstruction may be bought with it",
            )
    return list(told.values())


def _key(item: Measurement, rename: Mapping[str, str]) -> tuple:
    return (tuple(rename.get(name, name) for name in item.subjects), item.dataset, item.evaluator, item.metric)


def _match(left: Iterable[Measurement], right: Iterable[Measurement]) -> dict[str, str]:
    ours = {name for item in left for name in item.subjects}
    theirs = {name for item in right for name in item.subjects}
    if len(ours) == len(theirs) == 1 and ours != theirs:
        return {ours.pop(): theirs.pop()}
    return {}


def difference(a: Measurement, b: Measurement) -> Difference:
    """b - a, its standard error, and who is better, if that can be said.

    Unpaired: se = sqrt(se_a^2 + se_b^2), and a ranking only where the two 95 % intervals do not overlap.
    Paired (same text, per-sequence parts on both sides): se from the per-sequence differences, and a ranking only
    where the 95 % interval of the difference leaves out zero.
    """
    delta = b.value - a.value if a.value is not None and b.value is not None else None
    stderr, paired = None, False
    if delta is not None:
        stderr = _paired_stderr(a, b)
        paired = stderr is not None
        if not paired and a.stderr is not None and b.stderr is not None:
            stderr = sqrt(a.stderr**2 + b.stderr**2)
    verdict, reason = _verdict(a, b, delta, stderr, paired)
    return Difference(
        a.metric, a.dataset, a.evaluator, a.definition, a.better, a.subjects, b.subjects,
        a.value, b.value, a.stderr, b.stderr, delta, stderr, paired, verdict, reason,
    )  # fmt: skip


def _verdict(a: Measurement, b: Measurement, delta: float | None, stderr: float | None, paired: bool) -> tuple[str, str]:
    if a.definition != b.definition:
        return "not comparable", f"two definitions: {a.definition} and {b.definition}"
    if delta is None:
        which = " and ".join(name for name, item in (("the first", a), ("the second", b)) if item.value is None)
        reason = (a.reason if a.value is None else b.reason) or "not measured"
        return "not comparable", f"{which} has no value: {reason.partition(':')[0]}"
    if a.dataset_hash and b.dataset_hash and a.dataset_hash != b.dataset_hash:
        return "not comparable", "measured on different text (the dataset hashes differ)"
    if delta == 0:
        return "equal", ""
    if a.better not in ("higher", "lower"):
        return "not ranked", "neither direction is better"
    if paired:
        if abs(delta) <= Z95 * (stderr or 0.0):
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


def _paired_stderr(a: Measurement, b: Measurement) -> float | None:
    """Standard error of R_b - R_a for ratios R = sum(num) / sum(den) over the same n sequences (delta method).

    u_i = (num_i - R den_i) / mean(den);  se^2 = sum_i (u_i^b - u_i^a - mean)^2 / (n (n - 1)).
    None unless both sides keep the parts of the same text and these parts reproduce the value (or 1 - value).
    """
    if not a.dataset_hash or a.dataset_hash != b.dataset_hash or a.definition != b.definition:
        return None
    left, right = _influences(a), _influences(b)
    if left is None or right is None or len(left) != len(right) or len(left) < 2:
        return None
    gaps = [y - x for x, y in zip(left, right, strict=True)]
    mean, n = sum(gaps) / len(gaps), len(gaps)
    return sqrt(sum((gap - mean) ** 2 for gap in gaps) / (n * (n - 1)))


def _influences(item: Measurement) -> list[float] | None:
    sums = _sums(item.parts)
    if sums is None or item.value is None:
        return None
    top, bottom = sums
    if sum(bottom) == 0:
        return None
    ratio = sum(top) / sum(bottom)
    near = 1e-6 * max(1.0, abs(item.value))
    if abs(ratio - item.value) <= near:
        sign = 1.0
    elif abs(1 - ratio - item.value) <= near:
        sign = -1.0
    else:
        return None
    scale = sum(bottom) / len(bottom)
    return [sign * (x - ratio * y) / scale for x, y in zip(top, bottom, strict=True)]


def _sums(parts: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    for top, bottom in PARTS:
        if isinstance(parts.get(top), list) and isinstance(parts.get(bottom), list) and len(parts[top]) == len(parts[bottom]):
            return parts[top], parts[bottom]
    return None
