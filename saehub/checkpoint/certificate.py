"""The numbers of a conversion in; the certificate beside the target (conversion.json) out: is it still the same dictionary, and how is that known?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saehub.errors import FormatError
from saehub.jsonio import read_json, write_json_atomic

FILE = "conversion.json"
UNIT_ROUNDOFF = 2.0**-24
"""Of float32, in which both sides run."""
ROUNDOFFS = 8
"""A support difference is explained if the latent's float64 margin is at most this many roundoffs of its terms."""
FROBENIUS, PER_ROW = 1e-6, 1e-5
"""Largest relative difference of the reconstructions: all rows together, and the worst row."""
ACTIVE_SHARE = 0.9
"""Under this share of rows with an active latent, nothing was proved."""

BY_LIBRARY = "verified by the target's library"
BY_EQUATION = "verified against the published equation"
INCONCLUSIVE, REFUSED, UNVERIFIED, LOSSY = "inconclusive", "refused", "unverified", "lossy"


@dataclass
class Certificate:
    """The content of conversion.json. It proves that source and target compute the same, not that the source's metadata is right."""

    outcome: str
    """`verified by the target's library`, `verified against the published equation`, `inconclusive`, `lossy`, `unverified` or `refused`."""
    source: dict[str, Any]
    """`path`, `format`, `version` of its plugin and libraries, `tensors_hash`."""
    target: dict[str, Any]
    """The same of what was written (and read back)."""
    reason: str | None = None
    """Why it is not verified."""
    inputs: str = ""
    """Which rows were run."""
    rows: int = 0
    active_share: float = 0.0
    """Share of rows with at least one active latent."""
    mean_l0: float = 0.0
    """Active latents a row, in the source."""
    latents_exercised: float = 0.0
    """Share of latents active in some row, in the source."""
    support: dict[str, int] = field(default_factory=dict)
    """`rows_equal`; `different` (row, latent) pairs, `explained` ones (margin within rounding, or an exact tie), `unexplained`."""
    reconstruction: dict[str, float] = field(default_factory=dict)
    """Relative differences on rows of equal support: `frobenius`, `worst_row`."""
    features: dict[str, float] = field(default_factory=dict)
    """`worst_row`: largest |Δf| of a row over its largest |f|, on rows of equal support."""
    low_precision: dict[str, Any] | None = None
    """Informational: what the stored dtype itself costs, run in it instead of float32 (`dtype`, `frobenius`)."""
    bit_exact: list[str] = field(default_factory=list)
    """Tensors that come back from the target bit for bit."""
    changed: list[str] = field(default_factory=list)
    """Tensors that do not."""
    folded: list[str] = field(default_factory=list)
    """What the writer folded into other tensors."""
    dropped: list[str] = field(default_factory=list)
    """What the target cannot carry, not even beside."""
    side_channel: list[str] = field(default_factory=list)
    """What only the target's side channel carries."""
    cautions: list[str] = field(default_factory=list)
    """What to know of the source: that an earlier certificate of its own no longer holds."""
    original: str | None = None
    """Folder with the source's own tensors (`--keep-original`)."""
    criteria: dict[str, float] = field(
        default_factory=lambda: {"roundoffs": ROUNDOFFS, "frobenius": FROBENIUS, "per_row": PER_ROW, "active_share": ACTIVE_SHARE}
    )

    @property
    def passed(self) -> bool:
        """Whether the two were shown to be one dictionary."""
        return self.outcome in (BY_LIBRARY, BY_EQUATION)

    @property
    def exact_way_back(self) -> bool:
        """Whether converting back gives the source's tensors bit for bit."""
        return not self.changed or self.original is not None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": 1, **asdict(self), "passed": self.passed}

    def write(self, folder: Path) -> None:
        """`folder/conversion.json`."""
        write_json_atomic(Path(folder) / FILE, self.to_json())

    @classmethod
    def read(cls, file: Path) -> Certificate:
        """A stored certificate; FormatError if it is none."""
        data = read_json(file)
        if (
            not isinstance(data, dict)
            or data.get("schema") != 1
            or not isinstance(data.get("outcome"), str)
            or not isinstance(data.get("target"), dict)
        ):
            raise FormatError(f"{file} is not a conversion certificate", fix="convert again")
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})

    def __str__(self) -> str:
        lines = [f"{self.source['path']} ({self.source['format']}) -> {self.target['path']} ({self.target['format']}): {self.outcome}"]
        if self.reason:
            lines.append(f"  {self.reason}")
        lines += [f"  caution: the source's own {caution}" for caution in self.cautions]
        if self.rows:
            lines.append(
                f"  {self.rows} rows ({self.inputs}), mean L0 {self.mean_l0:.1f}, {self.latents_exercised:.1%} of latents exercised, {self.active_share:.1%} of rows active"
            )
            s = self.support
            lines.append(
                f"  supports: {s['different']} differences, {s['explained']} explained by rounding, {s['unexplained']} unexplained"
            )
            r = self.reconstruction
            lines.append(
                f"  reconstruction: {r['frobenius']:.1e} in all (allowed {FROBENIUS:.0e}), {r['worst_row']:.1e} in the worst row (allowed {PER_ROW:.0e})"
            )
        lines += [
            f"  {label}: {', '.join(items)}"
            for label, items in (
                ("bit-exact", self.bit_exact),
                ("changed", self.changed),
                ("folded", self.folded),
                ("dropped", self.dropped),
            )
            if items
        ]
        return "\n".join(lines)
