"""Intervals, paired test, smallest difference; the whole simulation is benchmarks/evaluation_statistics.py."""

from __future__ import annotations

import json
import math
from statistics import NormalDist, stdev

import numpy as np
import pytest

from benchmarks.evaluation_statistics import CASES, RESULT, Case, measure
from cogtune.evaluate.metric import ratio
from cogtune.evaluate.statistics import difference, estimate, student_quantile


def scores(*values: float) -> np.ndarray:
    return np.array([[value, 1.0] for value in values])


def test_the_simulation_keeps_its_word():
    """Its result is committed: coverage of 93 to 97 %, and a test that is wrong in one of twenty cases."""
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    assert [row["case"] for row in stored["rows"]] == [case.name for case in CASES]
    assert all(0.93 <= row["coverage"] <= 0.97 for row in stored["rows"])
    size = [row["p_below_0.05"] for row in stored["rows"] if row["true_difference"] == 0]
    assert size
    assert all(share <= 0.06 for share in size)  # the test is exact: with few answers it stays below 5 %


def test_a_small_simulation_does_too():
    """150 data sets: three standard errors around 95 % are 90 to 100 %."""
    found = measure(Case("small", 40, 4), 150)
    assert 0.9 <= found["coverage"] <= 1
    assert found["p_below_0.05"] <= 0.11


def test_questions_about_one_picture_do_not_count_as_independent():
    """Ten answers on each of 20 pictures, all right or all wrong: no more is known than of 20 answers."""
    right = [float(number % 2) for number in range(20)]
    many = scores(*(value for value in right for _ in range(10)))
    each = estimate(ratio, many, [number // 10 for number in range(200)])
    few = estimate(ratio, scores(*right), list(range(20)))
    assert (each.records, each.pictures) == (200, 20)
    assert each.low == pytest.approx(few.low)
    naive = estimate(ratio, many, list(range(200)))
    assert naive.high - naive.low < 0.5 * (each.high - each.low)


def test_the_test_is_the_exact_count_of_swaps():
    """Six pictures, all better: of 64 swaps two are as extreme."""
    found = difference(ratio, scores(*[1] * 6), scores(*[0] * 6), list(range(6)))
    assert (found.value, found.p) == (1.0, 2 / 64)
    mixed = difference(ratio, scores(1, 1, 1, 0, 1, 1), scores(0, 0, 0, 1, 1, 1), list(range(6)))
    assert mixed.p == 10 / 16
    assert not mixed.certain
    assert mixed.differing == 4


@pytest.mark.parametrize(("better", "worse"), [(12, 8), (15, 5), (20, 0)])
def test_of_too_many_swaps_to_count_the_test_draws_as_coins_fall(better, worse):
    """Pictures that one model alone has right are a coin each: the sign test's share, by binomial coefficients.

    Four standard deviations of 5,000 draws are 0.03 at most. It is never 0.
    """
    one, other = ([*first, *[1] * 20] for first in ([1] * better + [0] * worse, [0] * better + [1] * worse))
    found = difference(ratio, scores(*one), scores(*other), list(range(40)))
    count = better + worse
    wanted = sum(math.comb(count, n) for n in range(count + 1) if abs(2 * n - count) >= better - worse) / 2**count
    assert found.p == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 5000) + 1 / 5000)
    assert found.p > 0


def test_of_few_pictures_the_interval_is_as_wide_as_students():
    """Ten values of a normal distribution: 2.2622 standard errors; the tail of 5,000 draws scatters by 3 % a seed."""
    values = [NormalDist().inv_cdf((place + 0.5) / 10) for place in range(10)]
    found = [estimate(ratio, scores(*values), list(range(10)), seed) for seed in range(6)]
    half = sum((one.high - one.low) / 2 for one in found) / len(found)
    assert half == pytest.approx(2.2622 * stdev(values) / math.sqrt(10), rel=0.03)


def test_equal_answers_and_a_single_picture_say_nothing():
    same = difference(ratio, scores(1, 0, 1), scores(1, 0, 1), [0, 1, 2])
    assert (same.value, same.low, same.high, same.p, same.smallest, same.certain) == (0, 0, 0, 1, None, False)
    single = difference(ratio, scores(1, 1), scores(0, 0), [0, 0])
    assert (single.low, single.high, single.smallest, single.certain) == (None, None, None, False)
    assert estimate(ratio, scores(1, 1), [0, 0]).low is None


def test_the_smallest_difference_is_the_formula_for_independent_answers():
    """n = 7.85 x discordant share / difference^2: about 9 points with 200 answers of which a fifth differ."""
    one = scores(*[1] * 20, *[0] * 20, *[1] * 160)
    other = scores(*[0] * 20, *[1] * 20, *[1] * 160)
    found = difference(ratio, one, other, list(range(200)))
    assert found.smallest == pytest.approx((7.85 * 0.2 / 200) ** 0.5, rel=0.05)


def test_draws_are_seeded_and_order_free():
    draw = np.random.default_rng(0)
    one, other = (scores(*draw.integers(0, 2, 90)) for _ in range(2))
    pictures = [number // 3 for number in range(90)]
    first = difference(ratio, one, other, pictures)
    assert first == difference(ratio, one, other, pictures)
    swapped = difference(ratio, other, one, pictures)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-first.value, -first.high, -first.low))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423)])
def test_students_quantiles(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-3)
