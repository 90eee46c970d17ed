"""What an evaluation found, in words."""

from __future__ import annotations

from collections.abc import Sequence

from cogtune.evaluate.breakdown import DIMENSIONS, LANGUAGES, LENGTHS, OTHER, TURNS, YES_NO
from cogtune.evaluate.compare import Answers, Scored
from cogtune.evaluate.statistics import Difference, Estimate
from cogtune.evaluate.text import visible
from cogtune.language import aligned, phrase, tr

_NAMES = {"tuned": phrase("tuned"), "base": phrase("base")}
_CONTROLS = {"blank": phrase("{name}, pictures blanked"), "swap": phrase("{name}, pictures swapped")}
GROUP_NAMES = frozenset({OTHER, YES_NO, *LENGTHS, *LANGUAGES, *TURNS})
_SHOWN = 8  # groups of a kind on the console


def name_of(model: Answers) -> str:
    """A model's name in the user's language."""
    name = tr(_NAMES[model.name]) if model.name in _NAMES else visible(model.name)
    return tr(_CONTROLS[model.control], name=name) if model.control else name


def group_name(name: str) -> str:
    """A group's name in the user's language; labels and folders stay as they are."""
    return tr(name) if name in GROUP_NAMES else visible(name)


def verdicts(models: Sequence[Answers], scored: Scored) -> list[str]:
    """One sentence per model that the first is compared with; a single model's value if there is none."""
    found = [
        verdict(models[0], model, scored, difference)
        for model, difference in zip(models[1:], scored.differences, strict=True)
        if model.control is None
    ]
    return [*(found or [_alone(models[0], scored)]), *_controls(models, scored)]


def verdict(one: Answers, other: Answers, scored: Scored, found: Difference) -> str:
    """Say which of two models is better, by how much, and whether that could be chance."""
    better = found.value if scored.metric.higher else -found.value
    names = {"one": name_of(one), "other": name_of(other), "metric": tr(scored.metric.title)}
    if found.low is None or found.high is None:
        return tr(
            "{one} and {other} differ by {points:+.1f} points of {metric} on a single picture, which says nothing of"
            " others",
            **names,
            points=100 * found.value,
        )
    if found.differing == 0:
        return tr(
            "{one} and {other} score the same in {metric} on all {records} answers", **names, records=found.records
        )
    if not found.certain and found.low * found.high > 0:  # on few pictures the test sees less than the interval shows
        return tr(
            "{one} and {other} cannot be told apart: {points:+.1f} points of {metric} (95 % interval {low:+.1f} to"
            " {high:+.1f}, but {differing} of {pictures} pictures differ, and p = {p:.2f} that it is chance)",
            **names,
            points=100 * found.value,
            low=100 * found.low,
            high=100 * found.high,
            differing=found.differing,
            pictures=found.pictures,
            p=found.p,
        )
    if not found.certain:
        template = phrase("{one} and {other} cannot be told apart: {points:+.1f} points of {metric} ({detail})")
        return tr(template, **names, points=100 * found.value, detail=_detail(found, found.low, found.high, "+"))
    low, high = sorted((abs(found.low), abs(found.high)))
    values = {**names, "points": 100 * abs(found.value), "detail": _detail(found, low, high, "")}
    if better > 0:
        return tr("{one} beats {other} by {points:.1f} points of {metric} ({detail})", **values)
    return tr("{one} is worse than {other} by {points:.1f} points of {metric} ({detail})", **values)


def _detail(found: Difference, low: float, high: float, sign: str) -> str:
    values = {
        "low": f"{100 * low:{sign}.1f}",
        "high": f"{100 * high:{sign}.1f}",
        "records": found.records,
        "pictures": found.pictures,
    }
    if found.smallest is None:
        return tr("95 % interval {low} to {high}, from {records:,} answers about {pictures:,} pictures", **values)
    return tr(
        "95 % interval {low} to {high}; with {records:,} answers about {pictures:,} pictures, less than {smallest:.1f}"
        " points could not be told from chance",
        **values,
        smallest=100 * found.smallest,
    )


def _alone(model: Answers, scored: Scored) -> str:
    return tr(
        "{one}: {metric} {value} on {records:,} answers about {pictures:,} pictures",
        one=name_of(model),
        metric=tr(scored.metric.title),
        value=shown(scored.values[0]),
        records=scored.values[0].records,
        pictures=scored.values[0].pictures,
    )


def _controls(models: Sequence[Answers], scored: Scored) -> list[str]:
    """Whether the first model looks at its pictures."""
    found = []
    for model, difference in zip(models[1:], scored.differences, strict=True):
        if model.control is None:
            continue
        better = difference.value if scored.metric.higher else -difference.value
        values = {"name": name_of(model), "points": 100 * abs(difference.value), "metric": tr(scored.metric.title)}
        if difference.certain and better > 0:
            found.append(tr("{name}: {points:.1f} points of {metric} are lost, so the pictures are used", **values))
        else:
            found.append(
                tr("warning: {name}: no loss of {metric} can be seen, so the pictures may not be used", **values)
            )
    return found


def shown(value: Estimate) -> str:
    """A value in points, with its interval."""
    if value.low is None or value.high is None:
        return f"{100 * value.value:.1f}"
    numbers = {"value": 100 * value.value, "low": 100 * value.low, "high": 100 * value.high}
    return tr("{value:.1f} ({low:.1f} to {high:.1f})", **numbers)


def table(models: Sequence[Answers], results: Sequence[Scored]) -> list[str]:
    """Lines of a table: a row for each model, a column for each metric."""
    head = ["", *(f"{tr(one.metric.title)} [{one.values[0].records}]" for one in results)]
    rows = [[name_of(model), *(shown(one.values[at]) for one in results)] for at, model in enumerate(models)]
    return aligned([head, *rows])


def group_lines(models: Sequence[Answers], scored: Scored) -> list[str]:
    """Lines of the first metric's groups."""
    lines = []
    for way, parts in scored.groups.items():
        head = [tr(DIMENSIONS[way]), tr("answers"), *map(name_of, models)]
        rows = [
            [f"  {group_name(name)}", str(count), *(f"{100 * value:.1f}" for value in values)]
            for name, (count, values) in list(parts.items())[:_SHOWN]
        ]
        lines += aligned([head, *rows])
        if len(parts) > _SHOWN:
            lines.append(tr("  and {count} more in eval.json", count=len(parts) - _SHOWN))
    return lines
