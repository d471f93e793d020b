"""How numbers are said: two digits of the error, four of a bare value, and never a wrong one."""

from __future__ import annotations

import pytest

from saehub.report import numbers

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.12931, 0.0021, "0.1293 ± 0.0021"),
        (0.12931, 0.021, "0.129 ± 0.021"),
        (118.42, 1.3, "118.4 ± 1.3"),
        (32.0, 0.0, "32.00 ± 0"),
        (12345.678, 250.0, "12,346 ± 250"),
        (0.129, None, "0.1290"),
        (-0.00412, 0.0013, "-0.0041 ± 0.0013"),
        (0.0, None, "0"),
        (2.5e-6, None, "2.5e-06"),
        (None, 0.1, "-"),
        (float("nan"), 0.1, "-"),
        (0.5, float("nan"), "0.5000"),
        (0.5, 3e-9, "0.5 ± 3.0e-09"),
        (0.0999999, 0.001, "0.1000 ± 0.0010"),
        (3.2e7, None, "3.2e+07"),
    ],
)
def test_value_with_error(value, stderr, text):
    assert numbers.with_error(value, stderr) == text


@pytest.mark.parametrize("value", [0.9999999, 1e-4, 0.00123456, 12.3456, 1234.5, 9_999_999.0, -7.25])
def test_a_bare_value_keeps_four_digits(value):
    assert float(numbers.value(value).replace(",", "")) == pytest.approx(value, rel=5e-4)


@pytest.mark.parametrize(("value", "text"), [(0.01, "+0.0100 ± 0.0020"), (-0.01, "-0.0100 ± 0.0020"), (None, "-")])
def test_signed(value, text):
    assert numbers.signed(value, 0.002 if value else None) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (6_200_000, "6.2 MB"),
        (999_600, "1.0 MB"),
        (123_456_789_000, "123 GB"),
        (None, "-"),
        (5e18, "5000 PB"),
    ],
)
def test_size(size, text):
    assert numbers.size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (None, "-"),
        (float("inf"), "-"),
        (-1, "-"),
    ],
)
def test_duration(seconds, text):
    assert numbers.duration(seconds) == text


def test_counts_shares_and_moments():
    assert numbers.count(1_000_000) == "1,000,000"
    assert numbers.count(None) == "-"
    assert numbers.short(16_304) == "16.3k"
    assert numbers.short(2_000_000) == "2M"
    assert numbers.short(12) == "12"
    assert numbers.percent(0.0312) == "3.12 %"
    assert numbers.percent(None) == "-"
    assert numbers.moment(0) == "1970-01-01 00:00 UTC"
    assert numbers.moment(None) == "-"
