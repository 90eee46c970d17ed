"""Durations as people read them."""

from __future__ import annotations

import pytest

from cogtune.system.durations import format_clock, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (48 * 3600, "2.0 days")],
)
def test_an_estimate_has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")])
def test_a_countdown_is_exact_to_the_second(seconds: float, text: str) -> None:
    assert format_clock(seconds) == text
