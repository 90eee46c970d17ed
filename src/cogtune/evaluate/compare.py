"""Scores of several models' answers to the same questions: values, differences and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cogtune.evaluate.breakdown import groups
from cogtune.evaluate.choose import Choice, Chosen
from cogtune.evaluate.metric import Floats, Metric, statistics_of
from cogtune.evaluate.questions import Asked
from cogtune.evaluate.statistics import Difference, Estimate, difference, estimate


@dataclass(frozen=True)
class Answers:
    """A model's answers to the questions, in their order.

    Attributes:
        name: as tables call the model.
        control: ``blank`` or ``swap`` if it was shown other pictures; such a model is no contestant.
        source: what made the answers, for the record.
    """

    name: str
    texts: Sequence[str]
    control: str | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A metric's result.

    Attributes:
        places: positions of the scored records in the questions.
        values: of each model, in the order of the models.
        differences: the first model's value less each other's.
        groups: kind of group -> group -> (records, each model's value).
        records: each model's value of each scored record [models, records].
    """

    metric: Metric
    places: tuple[int, ...]
    values: list[Estimate]
    differences: list[Difference]
    groups: dict[str, dict[str, tuple[int, list[float]]]]
    records: Floats


def compare(asked: Asked, models: Sequence[Answers], choice: Choice, seed: int = 0) -> list[Scored]:
    """Score every model by every metric of ``choice``; the first model is compared with each other."""
    divided = groups(asked.questions, asked.sets)
    return [_scored(asked, models, chosen, divided, seed) for chosen in choice.metrics]


def _scored(
    asked: Asked, models: Sequence[Answers], chosen: Chosen, divided: dict[str, dict[str, list[int]]], seed: int
) -> Scored:
    metric, places = chosen.metric, chosen.places
    references = [asked.questions[place].references for place in places]
    scorer = metric.scorer(references)
    scores = [statistics_of(metric, [one.texts[place] for place in places], references, scorer) for one in models]
    _, pictures = np.unique([asked.pictures[place] for place in places], return_inverse=True)
    numbers = pictures.tolist()
    return Scored(
        metric,
        places,
        [estimate(metric.value, one, numbers, seed) for one in scores],
        [difference(metric.value, scores[0], other, numbers, seed) for other in scores[1:]],
        {way: found for way, parts in divided.items() if (found := _parts(metric, places, parts, scores))},
        np.array([[metric.record(row) for row in one] for one in scores]),
    )


def _parts(
    metric: Metric, places: Sequence[int], parts: dict[str, list[int]], scores: Sequence[Floats]
) -> dict[str, tuple[int, list[float]]]:
    """Values within the groups; nothing if all scored records are of one."""
    rows = {place: row for row, place in enumerate(places)}
    found = {}
    for name, members in parts.items():
        inside = [rows[place] for place in members if place in rows]
        if inside:
            found[name] = (len(inside), [float(metric.value(one[inside].sum(0))) for one in scores])
    return found if len(found) > 1 else {}
