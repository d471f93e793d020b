"""Pictures: points land where arithmetic says, ticks are round, names cannot break out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from saehub.report import svg

pytestmark = pytest.mark.quick
SPACE = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 999_424), (-0.03, 0.9), (1e-9, 3e-9), (17, 17.5), (-8, 0)])
def test_ticks_are_round_and_inside(low, high):
    marks = svg.ticks(low, high)
    assert 2 <= len(marks) <= 11
    assert all(low - 1e-12 <= mark <= high + 1e-12 for mark in marks)
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a) + 1e-9), 6) for a, b in zip(marks, marks[1:])}
    assert steps <= {1.0, 2.0, 5.0}


def points(picture: str) -> list[tuple[float, float]]:
    tree = ElementTree.fromstring(picture)
    return [tuple(map(float, pair.split(","))) for pair in tree.find(f"{SPACE}polyline").get("points").split()]


def test_points_are_linear_in_both_axes():
    drawn = points(svg.lines([svg.Series("a", [0, 50, 100], [0.0, 1.0, 4.0], 0)], title="t", x_label="x", log=False))
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(4.0, abs=0.02)  # up is smaller
    assert x0 == svg.LEFT and x2 == svg.WIDTH - svg.RIGHT


def test_values_over_three_decades_are_drawn_logarithmic():
    drawn = points(svg.lines([svg.Series("a", [0, 1, 2], [1.0, 10.0, 1000.0], 0)], title="t", x_label="x"))
    (_, y0), (_, y1), (_, y2) = drawn
    assert (y0 - y2) / (y0 - y1) == pytest.approx(3.0, abs=0.02)


def test_marks_that_would_read_alike_get_more_digits():
    picture = svg.points([svg.Series("a", [1, 2], [0.98312, 0.98317], 0, ["x", "y"])], title="t", x_label="x")
    marks = [tick.text for tick in ElementTree.fromstring(picture).iter(f"{SPACE}text") if tick.get("class") == "tick" and tick.text.startswith("0.98")]
    assert len(marks) > 1 and len(set(marks)) == len(marks)


def test_tokens_read_are_drawn_by_their_logarithm():
    drawn = points(svg.lines([svg.Series("a", [0, 10, 100, 10_000], [1.0, 0.8, 0.4, 0.0], 0)], title="t", x_label="x", log=False, log_x=True))
    (x0, _), (x1, _), (x2, _) = drawn  # nothing is at 0 tokens
    assert (x2 - x0) / (x1 - x0) == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [float("nan"), 1.0, float("inf"), 2.0], [-3.0, -1.0]])
def test_odd_series_are_drawn_without_odd_numbers(values):
    picture = svg.lines([svg.Series("a", list(range(len(values))), values, 0)], title="t", x_label="x", zero=True)
    ElementTree.fromstring(picture)
    assert "nan" not in picture.lower() and "inf" not in picture.lower()


def test_nothing_to_draw_is_nothing():
    assert svg.lines([svg.Series("a", [], [], 0)], title="t", x_label="x") == ""
    assert svg.histogram([svg.Series("a", [0, 1], [0], 0)], title="t", x_label="x") == ""


def test_long_curves_are_thinned_but_keep_their_ends():
    thin = svg.thin(svg.Series("a", list(range(10_000)), list(range(10_000)), 0))
    assert len(thin.x) <= svg.MOST_POINTS
    assert (thin.x[0], thin.x[-1]) == (0, 9999)


def test_histogram_keeps_its_area():
    """Width times height of the outline, over the frame's own scale, is the number of latents."""
    edges, counts = [-4 + 0.5 * i for i in range(9)], [0, 3, 10, 7, 0, 1, 0, 0]
    picture = svg.histogram([svg.Series("a", edges, counts, 0)], title="t", x_label="x")
    polygon = ElementTree.fromstring(picture).find(f"{SPACE}polygon")
    pairs = [tuple(map(float, pair.split(","))) for pair in polygon.get("points").split()]
    area = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(pairs, pairs[1:] + pairs[:1]))) / 2
    scale = (svg.WIDTH - svg.LEFT - svg.RIGHT) / (math.ceil(-1.0) - math.floor(-3.5)) * (svg.HEIGHT - svg.TOP - svg.BOTTOM) / (1.08 * 10)
    assert area / scale == pytest.approx(0.5 * sum(counts), rel=0.01)


def test_names_cannot_break_out():
    hostile = '</title><script>alert("x")</script>\x1b[31m'
    for picture in (
        svg.lines([svg.Series(hostile, [0, 1], [1, 2], 0)], title=hostile, x_label=hostile),
        svg.histogram([svg.Series(hostile, [0, 1], [3], 0)], title=hostile, x_label=hostile),
    ):
        ElementTree.fromstring(picture)
        assert "<script" not in picture and "\x1b" not in picture
        assert not re.search(r"\son\w+=", picture)
