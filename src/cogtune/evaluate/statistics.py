"""How certain a value or a difference is: bootstrap intervals, a paired test, the smallest difference to be seen.

Questions about one picture are right and wrong together, so pictures are resampled, not questions. Both models answer
the same questions; differences are taken within a picture, which is what makes small ones visible. Every draw is
seeded: the same answers give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Value = Callable[[Floats], Floats]
"""A metric's value of sums over records [..., statistics]."""

RESAMPLES = 5000
_LEVEL = 0.95
_POWER = 0.8
_AT_ONCE = 2_000_000  # draws held at a time: 16 MB
_TIE = 1e-12  # sums in another order differ by rounding


@dataclass(frozen=True)
class Estimate:
    """A metric's value over ``records`` about ``pictures``, with its 95 % interval (none for a single picture)."""

    value: float
    low: float | None
    high: float | None
    records: int
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """One model's value less another's, on the same records.

    Attributes:
        low, high: its 95 % interval; None for a single picture.
        p: of the paired test that the models answer alike.
        smallest: the smallest true difference that records like these show in four of five cases; None where all
            pictures differ by the same or not at all.
        differing: pictures whose scores differ.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    smallest: float | None
    records: int
    pictures: int
    differing: int

    @property
    def certain(self) -> bool:
        """Whether both the test and the interval say that the models differ."""
        return self.p < 1 - _LEVEL and self.low is not None and self.high is not None and self.low * self.high > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "certain": self.certain}


def estimate(value: Value, scores: Floats, pictures: Sequence[int], seed: int = 0) -> Estimate:
    """Return a metric's value with its interval.

    Args:
        value: the metric's value of summed statistics.
        scores: statistics of the records [records, statistics].
        pictures: the number of each record's picture, from 0.
    """
    sums = _sums(scores, pictures)
    found = float(value(sums.sum(0)))
    drawn = np.concatenate([value(counts @ sums) for counts in _resamples(len(sums), seed)]) if len(sums) > 1 else None
    return Estimate(found, *_interval(drawn, len(sums)), len(scores), len(sums))


def difference(value: Value, one: Floats, other: Floats, pictures: Sequence[int], seed: int = 0) -> Difference:
    """Return how much ``one`` exceeds ``other``; the arguments are as for `estimate`."""
    ours, theirs = _sums(one, pictures), _sums(other, pictures)
    found = float(value(ours.sum(0)) - value(theirs.sum(0)))
    count, drawn, smallest = len(ours), None, None
    differing = int((ours != theirs).any(1).sum())
    if count > 1:
        drawn = np.concatenate(
            [value(counts @ ours) - value(counts @ theirs) for counts in _resamples(count, seed)]
        )  # fmt: skip
        spread = float(drawn.std(ddof=1)) * math.sqrt(count / (count - 1))
        if spread > _TIE:
            smallest = (student_quantile((1 + _LEVEL) / 2, count - 1) + NormalDist().inv_cdf(_POWER)) * spread
    p = _paired_p(value, ours, theirs, found, seed)
    return Difference(found, *_interval(drawn, count), p, smallest, len(one), count, differing)


def student_quantile(share: float, freedom: int) -> float:
    """Return the quantile of Student's distribution (Cornish and Fisher's expansion; 1 % low at 3 degrees)."""
    z, n = NormalDist().inv_cdf(share), freedom
    if n < 3:
        exact = {1: math.tan(math.pi * (share - 0.5)), 2: (2 * share - 1) / math.sqrt(2 * share * (1 - share))}
        return exact[n]
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _sums(scores: Floats, pictures: Sequence[int]) -> Floats:
    """Sum statistics over the records of each picture."""
    sums = np.zeros((max(pictures) + 1, scores.shape[1]))
    np.add.at(sums, np.asarray(pictures), scores)
    return sums


def _resamples(count: int, seed: int) -> list[Floats]:
    """Return how often each of ``count`` pictures is drawn in each resample, in parts."""
    draw = np.random.default_rng(seed)
    part = max(1, _AT_ONCE // count)
    sizes = [min(part, RESAMPLES - start) for start in range(0, RESAMPLES, part)]
    return [draw.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64) for size in sizes]


def _interval(drawn: Floats | None, count: int) -> tuple[float | None, float | None]:
    """Return the percentile interval, widened for few pictures as Student's distribution is wider than the normal."""
    if drawn is None:
        return None, None
    wide = math.sqrt(count / (count - 1)) * student_quantile((1 + _LEVEL) / 2, count - 1)
    share = NormalDist().cdf(-wide)
    low, high = np.quantile(drawn, [share, 1 - share])
    return float(low), float(high)


def _paired_p(value: Value, ours: Floats, theirs: Floats, found: float, seed: int) -> float:
    """Return how often swapping the models within pictures makes a difference as large; all swaps if there are few."""
    changed = (ours != theirs).any(1)
    base = ours[~changed].sum(0)
    ours, theirs = ours[changed], theirs[changed]
    count = len(ours)
    if count == 0:
        return 1.0
    every = 2**count <= RESAMPLES
    draw = np.random.default_rng(seed + 1)
    part = 2**count if every else max(1, _AT_ONCE // count)
    extreme = total = 0
    while total < (2**count if every else RESAMPLES):
        size = part if every else min(part, RESAMPLES - total)
        bits = (np.arange(size)[:, None] >> np.arange(count)) & 1 if every else draw.integers(0, 2, (size, count))
        swap = bits.astype(np.float64)
        one = base + swap @ theirs + (1 - swap) @ ours
        other = base + swap @ ours + (1 - swap) @ theirs
        extreme += int((np.abs(value(one) - value(other)) >= abs(found) - _TIE).sum())
        total += size
    return extreme / total if every else (extreme + 1) / (total + 1)
