"""A run's measurements and facts in; the trade-off of sparsity against fidelity, read at matched L0, and metrics by layer, out.

Two SAEs with different L0 are two points of one trade-off: a lower FVU at a higher L0 proves nothing. SAEs that differ in their sparsity
only (same trainer, width, site and target) form a curve, and curves are compared where they share an L0: at a measured point, or between two
of them, linear in log L0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any

from saehub.api import Measurement
from saehub.report.table import FIRST

FIDELITY = (("fvu", "FVU", "lower"), ("ce_recovered_zero", "CE recovered (zero-ablation)", "higher"))
LAYER_METRICS = (
    ("ce_recovered_zero", "CE recovered (zero-ablation)"),
    ("fvu", "FVU"),
    ("l0", "L0"),
    ("never_fired_share", "latents that never fired"),
    ("redundancy", "redundancy"),
)
MOST_READINGS = 6
SAME = 0.01
"""Two L0 within this share of each other count as one."""


@dataclass
class Curve:
    """SAEs that differ in their sparsity only."""

    name: str
    points: list[tuple[float, float, str]] = field(default_factory=list)
    """(L0, value, SAE), by L0."""

    def at(self, l0: float) -> tuple[float, bool] | None:
        """(value at this L0, whether it was measured there); None outside of what was measured."""
        near = min(self.points, key=lambda point: abs(log(point[0] / l0)), default=None)
        if near is not None and abs(near[0] / l0 - 1) <= SAME:
            return near[1], True
        for (x0, y0, _), (x1, y1, _) in zip(self.points, self.points[1:]):
            if x0 <= l0 <= x1 and x1 > x0:
                return y0 + (y1 - y0) * log(l0 / x0) / log(x1 / x0), False
        return None


@dataclass(frozen=True)
class Tradeoff:
    """One site, one measure of fidelity, on one dataset."""

    site: str
    metric: str
    title: str
    better: str
    dataset: str
    curves: Sequence[Curve]

    @property
    def matched(self) -> list[float]:
        """L0 values at which at least two curves can be read: those that were measured, at most `MOST_READINGS`."""
        known = sorted({round(x, 6) for curve in self.curves for x, _, _ in curve.points})
        found: list[float] = []
        for l0 in known:
            if found and l0 / found[-1] - 1 <= SAME:
                continue
            if sum(curve.at(l0) is not None for curve in self.curves) > 1:
                found.append(l0)
        step = max(1, -(-len(found) // MOST_READINGS))
        return found[::step]

    def front(self) -> list[str]:
        """SAEs that no other beats at an L0 as low."""
        best, found = None, []
        everything = sorted((x, y if self.better == "lower" else -y, name) for curve in self.curves for x, y, name in curve.points)
        for _, y, name in everything:
            if best is None or y < best:
                best = y
                found.append(name)
        return found


def first_dataset(measurements: Iterable[Measurement]) -> str | None:
    """`in_sample`, or else the first one."""
    names = list(dict.fromkeys(row.dataset for row in measurements if row.dataset is not None))
    return FIRST[0] if FIRST[0] in names else names[0] if names else None


def values(measurements: Iterable[Measurement], dataset: str | None) -> dict[str, dict[str, float]]:
    """SAE -> metric -> its value on the dataset, or of the weights alone."""
    found: dict[str, dict[str, float]] = {}
    for row in measurements:
        if row.status == "ok" and row.value is not None and len(row.subjects) == 1 and row.dataset in (dataset, None):
            found.setdefault(row.subjects[0], {}).setdefault(row.metric, row.value)
    return found


def tradeoffs(measurements: Sequence[Measurement], saes: Mapping[str, Mapping[str, Any]]) -> list[Tradeoff]:
    """One for each site with SAEs of different L0 and each measure of fidelity; `saes` are those of run_card.json."""
    dataset = first_dataset(measurements)
    known = values(measurements, dataset)
    sites = {row.subjects[0]: row.site for row in measurements if len(row.subjects) == 1}
    found = []
    for site in dict.fromkeys(sites[name] for name in known):
        names = [name for name in known if sites[name] == site and known[name].get("l0", 0) > 0]
        for metric, title, better in FIDELITY:
            curves: dict[str, Curve] = {}
            for name in names:
                if metric in known[name]:
                    family = _family(name, saes.get(name) or {})
                    curves.setdefault(family, Curve(family)).points.append((known[name]["l0"], known[name][metric], name))
            for curve in curves.values():
                curve.points.sort()
            sparsities = [x for curve in curves.values() for x, _, _ in curve.points]
            if sparsities and max(sparsities) > (1 + SAME) * min(sparsities):  # SAEs of one L0 are a column of the table, no trade-off
                found.append(Tradeoff(site or "-", metric, title, better, dataset or "", list(curves.values())))
    return found


def _family(name: str, sae: Mapping[str, Any]) -> str:
    """`native/topk, 1,280 latents`: what the SAEs of one curve have in common."""
    provenance = sae.get("provenance") or {}
    trainer = sae.get("trainer") or (provenance.get("trainer") or {}).get("component")
    if not trainer and not sae.get("architecture"):
        return name
    target = provenance.get("target_site")
    words = [str(trainer or sae["architecture"]), f"{sae['d_sae']:,} latents" if sae.get("d_sae") else "", f"→ {target}" if target else ""]
    return ", ".join(word for word in words if word)


def layers(measurements: Sequence[Measurement]) -> list[tuple[str, str, list[tuple[float, float, str]]]]:
    """(metric, title, [(layer, value, SAE)]) of every metric in `LAYER_METRICS` that was measured in at least two layers of one kind of site."""
    dataset = first_dataset(measurements)
    known = values(measurements, dataset)
    sites = {row.subjects[0]: row.site or "" for row in measurements if len(row.subjects) == 1}
    depth = {name: layer(site) for name, site in sites.items()}
    if len({at for at in depth.values() if at is not None}) < 2:
        return []
    found = []
    for metric, title in LAYER_METRICS:
        points = sorted((depth[name], own[metric], name) for name, own in known.items() if metric in own and depth[name] is not None)
        if len({x for x, _, _ in points}) > 1:
            found.append((metric, title, points))
    return found


def layer(site: str) -> int | None:
    """6 for `resid_post.6` and `model.layers.6.mlp:in`."""
    return next((int(part) for part in site.replace(":", ".").split(".") if part.isdigit()), None)
