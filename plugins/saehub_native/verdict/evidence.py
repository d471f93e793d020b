"""Measurements of one SAE (or the few numbers of a published table) in; the quantities that the rules look at, each with where it came from, out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from saehub.api import Measurement

IN, OUT = "in_sample", "out_of_sample"


@dataclass(frozen=True)
class Evidence:
    """What is known about one SAE; None is `not measured`. A published row fills a few fields, measurements fill most."""

    latents: int | None = None
    d_in: int | None = None
    l0: float | None = None
    fvu: float | None = None
    """In sample, as all that does not say `out`."""
    fvu_random: float | None = None
    """Of random directions, same k and width: the null of reconstruction."""
    fvu_pca: float | None = None
    fvu_out: float | None = None
    fvu_random_out: float | None = None
    recovered: float | None = None
    """Cross-entropy recovered, zero-ablation; None, too, where ablation costs so little that a share of it means nothing."""
    recovered_out: float | None = None
    loss_clear: bool = True
    """Whether zero-ablation in sample costs clearly more than nothing, where it was measured."""
    dead: float | None = None
    """Share of latents that are dead, or that never fired: an upper bound of it."""
    bound: float | None = None
    """3/N: the 95 % bound on the rate of a silent latent; None: the token budget is unknown."""
    dead_decided: bool = False
    """Whether native/core's own rule calls the silent ones dead."""
    redundancy: float | None = None
    redundancy_null: float | None = None
    duplicates: float | None = None
    finite_weights: float | None = None
    finite_rows: float | None = None
    norm_ratio: float | None = None
    moved: float | None = None
    """How far training moved the weights from their initial state, as a share of their norm (`saehub.pipeline.movement`); None: not recorded."""
    cautions: tuple[str, ...] = ()
    """What the hub warned of: another site that the SAE fits better."""
    broken: tuple[str, ...] = ()
    """Reasons of failed measurements."""
    outside: str | None = None
    """Name of the dataset that `out` stands for."""
    sources: dict[str, Measurement] = field(default_factory=dict, compare=False)
    """Field -> the measurement that it came from."""

    @property
    def mean_rate(self) -> float | None:
        """L0 / F: how often a latent fires if all are used alike."""
        return self.l0 / self.latents if self.l0 is not None and self.latents else None

    @property
    def excess(self) -> float | None:
        """(redundancy - null) / (1 - null): 0 for random directions, 1 for copies. Without a null, the redundancy itself (null 0)."""
        if self.redundancy is None:
            return None
        null = self.redundancy_null or 0.0
        return (self.redundancy - null) / (1 - null)


_FIELDS = {
    "fvu": "fvu", "fvu_random": "fvu_random", "fvu_pca": "fvu_pca", "ce_recovered_zero": "recovered", "l0": "l0", "finite_share": "finite_rows", "norm_ratio": "norm_ratio",
}  # fmt: skip
_OUTSIDE = {"fvu": "fvu_out", "fvu_random": "fvu_random_out", "ce_recovered_zero": "recovered_out"}
_WEIGHTS = {"redundancy": "redundancy", "redundancy_null": "redundancy_null", "duplicate_share": "duplicates", "finite_weights": "finite_weights"}


def gather(rows: Iterable[Measurement], *, latents: int | None = None, d_in: int | None = None, moved: float | None = None, cautions: Iterable[str] = ()) -> Evidence:
    """The evidence in the measurements of one SAE. In sample is the dataset of that name, else the first one; out of sample likewise."""
    rows = list(rows)
    names = list(dict.fromkeys(row.dataset for row in rows if row.dataset is not None))
    inside = IN if IN in names else names[0] if names else None
    outside = OUT if OUT in names else next((name for name in names if name != inside), None)
    found: dict[str, float] = {}
    sources: dict[str, Measurement] = {}
    broken: dict[str, None] = {}
    clear = True
    for row in rows:
        if row.status == "failed" and row.reason and not row.metric.startswith("out_minus_in"):
            broken[row.reason] = None
        table = _WEIGHTS if row.dataset is None else _FIELDS if row.dataset == inside else _OUTSIDE if row.dataset == outside else {}
        name = table.get(row.metric)
        if name == "recovered" and row.parts.get("clear") is False:
            clear = False
        if name and row.status == "ok" and name not in found and row.parts.get("clear") is not False:
            found[name], sources[name] = row.value, row
    evidence = Evidence(**found, loss_clear=clear, latents=latents, d_in=d_in, moved=moved, cautions=tuple(cautions), broken=tuple(broken), outside=outside, sources=sources)
    return _deadness(evidence, [row for row in rows if row.dataset == inside])


def _deadness(evidence: Evidence, rows: list[Measurement]) -> Evidence:
    """native/core's dead share at the strictest rate that the budget decides; else the share that never fired, with its bound."""
    decided = [row for row in rows if row.metric.partition("@")[0] == "dead_share" and row.status == "ok"]
    silent = next((row for row in rows if row.metric == "never_fired_share" and row.status == "ok"), None)
    chosen = decided[0] if decided else silent
    if chosen is None:
        return evidence
    sources = {**evidence.sources, "dead": chosen}
    return replace(evidence, dead=chosen.value, bound=chosen.parts.get("bound"), dead_decided=bool(decided), sources=sources)
