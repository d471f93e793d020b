"""One SAE's measurements on several datasets in; out-of-sample minus in-sample of every metric, with errors, out. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from saehub.api import Measurement
from saehub_native.health.definitions import of_metric

Z95 = 1.959964
SKIPPED = ("out_minus_in",)


def deltas(rows: Iterable[Measurement], first: str | None, make: Callable[..., Measurement]) -> list[Measurement]:
    """A row `out_minus_in@metric` for each metric and each dataset other than `first`; where a side has no number, the row says which.

    `make(row, **changes)` copies a row: the evaluator's own name, version and so on are set there.
    """
    rows = [row for row in rows if row.dataset is not None and row.metric.partition("@")[0] not in SKIPPED]
    known = {(row.metric, row.definition): row for row in rows if row.dataset == first}
    found: dict[tuple, Measurement] = {}
    for row in rows:
        base = known.get((row.metric, row.definition))
        if base is None or row.dataset == first:
            continue
        changes = {
            "metric": f"out_minus_in@{row.metric}", "definition": of_metric("out_minus_in").id, "better": "none", "unit_of_n": row.unit_of_n,
            "value": None, "stderr": None, "ci_low": None, "ci_high": None, "note": None, "parts": {}, "reason": None, "n": row.n,
        }  # fmt: skip
        missing = next((side for side in (base, row) if side.status != "ok" or side.value is None), None)
        if missing is not None:
            changes |= {"status": "not_measured", "reason": f"{row.metric} on {missing.dataset}: {missing.reason or missing.status}", "n": None}
        else:
            value = row.value - base.value
            changes |= {"value": value, "status": "ok"}
            if base.stderr is not None and row.stderr is not None:
                error = math.hypot(base.stderr, row.stderr)
                changes |= {"stderr": error, "ci_low": value - Z95 * error, "ci_high": value + Z95 * error}
            else:
                changes["note"] = "no error: one side has none"
        found.setdefault((changes["metric"], row.dataset), make(row, **changes))
    return list(found.values())
