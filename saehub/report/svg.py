"""Series of points, or counts in bins, in; inline SVG out, coloured by the page's own CSS variables, readable without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from saehub.report import numbers
from saehub.report.text import clean

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 36
MOST_POINTS = 300
"""Points kept of a curve: more than that is less than two pixels each."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one outline of a histogram."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """Index into the page's palette."""
    labels: Sequence[str] = ()
    """A name for each point, where points are told apart."""
    joined: bool = True
    """Whether a line goes through the points."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About that many round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(series: Series) -> Series:
    """At most `MOST_POINTS` points, first and last among them."""
    n = len(series.x)
    if n <= MOST_POINTS:
        return series
    chosen = sorted({round(i * (n - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})
    return Series(series.name, [series.x[i] for i in chosen], [series.y[i] for i in chosen], series.colour)


class _Frame:
    """Where numbers fall on the picture; `log` makes the y axis logarithmic."""

    def __init__(self, low_x: float, high_x: float, low_y: float, high_y: float, log: bool):
        self.log = log
        self.low_x, self.high_x = low_x, high_x if high_x > low_x else low_x + 1
        self.low_y, self.high_y = (math.log10(low_y), math.log10(high_y)) if log else (low_y, high_y)
        if not self.high_y > self.low_y:
            self.high_y = self.low_y + (abs(self.low_y) or 1.0)

    def x(self, value: float) -> str:
        return f"{LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        value = math.log10(value) if self.log else value
        return f"{HEIGHT - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM):.1f}"


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_text: Callable[[float], str] = lambda y: f"{y:.3g}",
    zero: bool = False,
    log: bool | None = None,
    log_x: bool = False,
) -> str:
    """A line chart. `zero` begins the y axis at 0; `log` None: logarithmic where the values span more than a factor of 30."""
    kept = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None and math.isfinite(y) and not (log_x and x <= 0)]
        points = [(math.log10(x), y) for x, y in points] if log_x else points
        if points:
            kept.append(thin(Series(one.name, *zip(*points, strict=True), one.colour)))
    if not kept:
        return ""
    values = [y for one in kept for y in one.y]
    low, high = min(values), max(values)
    log = (low > 0 and high / low > 30) if log is None else log
    if not log:
        low = 0.0 if zero and low > 0 else low
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        high, low = high + pad, low - (0.0 if zero else pad)
    frame = _Frame(min(x for one in kept for x in one.x), max(x for one in kept for x in one.x), low, high, log)
    marks = [10.0**p for p in range(math.ceil(frame.low_y - 1e-9), math.floor(frame.high_y + 1e-9) + 1)] if log else ticks(low, high)
    if log and len(marks) < 2:
        marks = [
            factor * 10.0**p
            for p in range(math.floor(frame.low_y), math.ceil(frame.high_y) + 1)
            for factor in (1, 2, 5)
            if low <= factor * 10.0**p <= high
        ]
    x_marks = range(math.ceil(frame.low_x - 1e-9), math.floor(frame.high_x + 1e-9) + 1) if log_x else ticks(frame.low_x, frame.high_x)
    parts = [_axes(frame, x_marks, marks, (lambda x: numbers.short(10**x)) if log_x else numbers.short, y_text, x_label)]
    for one in kept:
        path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in zip(one.x, one.y, strict=True))
        shape = (
            f'<polyline class="line s{one.colour % 6}" points="{path}">'
            if len(one.x) > 1
            else f'<circle class="dot s{one.colour % 6}" cx="{frame.x(one.x[0])}" cy="{frame.y(one.y[0])}" r="3">'
        )
        end = "polyline" if len(one.x) > 1 else "circle"
        parts.append(f"{shape}<title>{_safe(one.name)}: {_safe(y_text(one.y[-1]))} at the end</title></{end}>")
    return _svg(title, parts)


def points(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    x_text: Callable[[float], str] = numbers.short,
    y_text: Callable[[float], str] = lambda y: f"{y:.3g}",
    x_marks: Sequence[float] | None = None,
    low: float | None = None,
) -> str:
    """Dots with a name each, joined by a line where a series says so; both axes linear. `low` is the least value on the y axis."""
    kept = []
    for one in series:
        names = one.labels or [one.name] * len(one.x)
        found = [(x, y, name) for x, y, name in zip(one.x, one.y, names, strict=True) if y is not None and math.isfinite(y) and math.isfinite(x)]
        if found:
            kept.append((one, sorted(found, key=lambda item: item[0])))
    if not kept:
        return ""
    xs, ys = [x for _, found in kept for x, _, _ in found], [y for _, found in kept for _, y, _ in found]
    pad_x = 0.06 * (max(xs) - min(xs)) or 0.1 * abs(xs[0]) or 1.0
    pad_y = 0.08 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0
    bottom = min(ys) - pad_y
    if low is not None:
        bottom = min(low, min(ys))
    elif min(ys) >= 0:
        bottom = max(bottom, 0.0)
    frame = _Frame(min(xs) - pad_x, max(xs) + pad_x, bottom, max(ys) + pad_y, False)
    parts = [_axes(frame, ticks(frame.low_x, frame.high_x) if x_marks is None else x_marks, ticks(frame.low_y, frame.high_y), x_text, y_text, x_label)]
    for one, found in kept:
        style = f"s{one.colour % 6}"
        if one.joined and len(found) > 1:
            parts.append(f'<polyline class="line {style}" points="{" ".join(f"{frame.x(x)},{frame.y(y)}" for x, y, _ in found)}"/>')
        for x, y, name in found:
            parts.append(
                f'<circle class="dot {style}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3.5">'
                f"<title>{_safe(name)}: {_safe(y_text(y))} at {_safe(x_text(x))}</title></circle>"
            )
    return _svg(title, parts)


def histogram(series: Sequence[Series], *, title: str, x_label: str) -> str:
    """Outlines over common bins: `x` holds the n+1 edges (log10), `y` the n counts; the first is filled."""
    kept = [one for one in series if len(one.x) == len(one.y) + 1 and sum(one.y)]
    if not kept:
        return ""
    filled = [(one.x[i], one.x[i + 1]) for one in kept for i, count in enumerate(one.y) if count]
    low, high = math.floor(min(a for a, _ in filled)), math.ceil(max(b for _, b in filled))
    frame = _Frame(low, high, 0.0, 1.08 * max(count for one in kept for count in one.y), False)
    decades = range(low, high + 1)
    parts = [
        _axes(
            frame,
            decades,
            [t for t in ticks(0.0, frame.high_y) if t == int(t)],
            lambda p: f"1e{p:.0f}" if p else "1",
            numbers.short,
            x_label,
        )
    ]
    for i, one in enumerate(kept):
        points = [(one.x[0], 0.0)]
        for j, count in enumerate(one.y):
            points += [(one.x[j], count), (one.x[j + 1], count)]
        points.append((one.x[-1], 0.0))
        path = " ".join(f"{frame.x(min(max(x, low), high))},{frame.y(y)}" for x, y in points)
        parts.append(
            f'<polygon class="area s{one.colour % 6}{" filled" if i == 0 else ""}" points="{path}">'
            f"<title>{_safe(one.name)}: {numbers.count(sum(one.y))} latents</title></polygon>"
        )
    return _svg(title, parts)


def _axes(
    frame: _Frame,
    x_marks: Sequence[float],
    y_marks: Sequence[float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_label: str,
) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    named = [y_text(mark) for mark in y_marks]
    if len(set(named)) < len(named):  # too near to each other for so few digits
        named = [f"{mark:.6g}" for mark in y_marks]
    for mark, name in zip(y_marks, named, strict=True):
        y = frame.y(mark)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y}" dy="3.5" text-anchor="end">{_safe(name)}</text>'
        )
    for mark in x_marks:
        x = frame.x(mark)
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 4}"/>'
            f'<text class="tick" x="{x}" y="{floor + 16}" text-anchor="middle">{_safe(x_text(mark))}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{_safe(x_label)}</text>')
    return "".join(parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_safe(title)}" xmlns="http://www.w3.org/2000/svg"><title>{_safe(title)}</title>{"".join(parts)}</svg>'


def _safe(words: object) -> str:
    return escape(clean(words))
