"""Numbers in; the short words that people read out: values to the precision that their error supports, counts, bytes, times."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def value(number: float | None, stderr: float | None = None) -> str:
    """`0.1290` for 0.12903 ± 0.0021 (two digits of the error), four significant digits without an error, `-` for None."""
    if number is None or not math.isfinite(number):
        return "-"
    if number == 0 and not stderr:
        return "0"
    if stderr and math.isfinite(stderr) and stderr > 0:
        return _fixed(number, _decimals(stderr))
    size = abs(number)
    if size >= 1e7 or size < 1e-4:
        return f"{number:.3g}"
    return _fixed(number, max(0, 3 - math.floor(math.log10(size))))


def with_error(number: float | None, stderr: float | None = None) -> str:
    """`0.1290 ± 0.0021`, or the bare value where no error is known."""
    if number is None or not math.isfinite(number) or stderr is None or not math.isfinite(stderr):
        return value(number)
    if stderr <= 0:
        return f"{value(number)} ± 0"
    if stderr < 1e-6:
        return f"{number:.6g} ± {stderr:.1e}"
    return f"{value(number, stderr)} ± {_fixed(stderr, _decimals(stderr))}"


def _decimals(stderr: float) -> int:
    """Decimals that show two significant digits of the error, at most 6."""
    return min(6, max(0, 1 - math.floor(math.log10(stderr))))


def _fixed(number: float, decimals: int) -> str:
    return f"{number:,.{decimals}f}"


def signed(number: float | None, stderr: float | None = None) -> str:
    """`with_error` with the sign always there: a difference."""
    text = with_error(number, stderr)
    return "+" + text if number is not None and number >= 0 and text != "-" else text


def count(number: float | None) -> str:
    """`1,000,000`; `-` for None."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def short(number: float | None) -> str:
    """`1.2M`: a count where there is little room."""
    if number is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def size(number: float | None) -> str:
    """`6.2 MB` (powers of 1000); `-` for None."""
    if number is None:
        return "-"
    amount = float(number)
    for unit in UNITS:
        if abs(amount) < 999.5 or unit == UNITS[-1]:
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """`3.2 s`, `2 min 05 s`, `1 h 04 min`; `-` for None."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def percent(share: float | None) -> str:
    """`3.1 %` of a share between 0 and 1; `-` for None."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.3g} %"


def moment(seconds: float | None) -> str:
    """`2025-01-31 14:05 UTC` of seconds since the epoch; `-` for None."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
