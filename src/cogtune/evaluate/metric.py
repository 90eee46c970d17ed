"""What a metric is: what it compares, which records it fits, and how scores of records become one number.

A record's score is a short vector of statistics, and a metric's value is a function of their sum over records: for a
mean (score, 1), for error rates (errors, length), for BLEU the n-gram counts. So corpus metrics resample as means do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from cogtune.evaluate.boxes import find_boxes
from cogtune.evaluate.numbers import find_number
from cogtune.evaluate.text import words

References = Sequence[str]
Floats = npt.NDArray[np.float64]
Score = Callable[[str, References], Sequence[float]]
"""The statistics of one answer."""
Kind = Literal["box", "number", "short", "long"]

_SHORT = 6  # words of the longest reference that still is a short answer


def kind_of(references: References) -> Kind:
    """Return what a record asks for, from its right answers: a box, a number, a few words, or a text."""
    if all(find_boxes(reference) for reference in references):
        return "box"
    if all(find_number(reference) is not None and len(words(reference)) <= 3 for reference in references):
        return "number"
    return "short" if max(len(words(reference)) for reference in references) <= _SHORT else "long"


def ratio(sums: Floats) -> Floats:
    """The first sum divided by the second: a mean, or a rate."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: as ``--metrics`` takes it.
        title: as tables show it, a template of `cogtune.language`.
        about: what is compared, another.
        fits: whether a record with these right answers can be scored by it.
        scorer: given the references of all records, returns the function that scores one answer.
        value: of sums over records [..., statistics], in 0 to 1 (rates can exceed 1).
        higher: whether more is better.
        kinds: records that it is computed for when nobody names it.
        package: the one of the extra ``metrics`` that it needs.
    """

    name: str
    title: str
    about: str
    fits: Callable[[References], bool]
    scorer: Callable[[Sequence[References]], Score]
    value: Callable[[Floats], Floats] = ratio
    higher: bool = True
    kinds: tuple[Kind, ...] = ()
    package: str | None = None
    record: Callable[[Floats], float] = field(default=lambda sums: float(ratio(sums)))
    """The value of one record, to sort and show it."""


def best_of(score: Callable[[str, str], float]) -> Callable[[Sequence[References]], Score]:
    """The scorer of a mean whose record's score is the best over its references."""

    def scored(answer: str, references: References) -> tuple[float, float]:
        return max(score(answer, reference) for reference in references), 1.0

    return lambda corpus: scored


def statistics_of(
    metric: Metric, answers: Sequence[str], references: Sequence[References], scorer: Score | None = None
) -> Floats:
    """Return the statistics [records, statistics] of answers, each with its right answers."""
    score = scorer or metric.scorer(references)
    return np.array([score(answer, right) for answer, right in zip(answers, references, strict=True)], dtype=np.float64)


def corpus_value(metric: Metric, answers: Sequence[str], references: Sequence[References]) -> float:
    """Return a metric's value over a corpus."""
    return float(metric.value(statistics_of(metric, answers, references).sum(0)))
