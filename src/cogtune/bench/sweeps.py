"""Series with one growing setting: the cost of longer text, larger batches, more questions or a higher rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogtune.bench.report import Results, table
from cogtune.errors import ConfigError
from cogtune.language import tr

MOST_OVER_FIT = 1.3
"""Allowed excess of a point over the straight line between its neighbours."""


@dataclass(frozen=True)
class Series:
    """A series.

    ``points``: values of the setting; ``words``: a value -> arguments of its variant; ``tiny``: values small enough for
    a test.
    """

    points: tuple[int, ...]
    words: Callable[[int], str]
    tiny: tuple[int, ...]


SERIES = {
    "text": Series((100, 250, 500, 1000, 1500, 2000, 3000, 4000, 6000), lambda n: f"preset=text={n}", (40, 60, 80)),
    "batch": Series(
        (1, 2, 3, 4, 6, 8, 12, 16), lambda n: f"train.batch_size={n} train.gradient_checkpointing=all", (1, 2, 3)
    ),
    "questions": Series((1, 2, 3, 5, 8, 10, 15, 20), lambda n: f"preset=questions={n}", (1, 2, 3)),
    "rank": Series((8, 16, 32, 64, 128, 256), lambda n: f"lora.rank={n}", (2, 4, 8)),
}
_BATCHES, _TEXTS = (1, 2, 4, 8), (100, 400, 1000)
_TINY_BATCHES, _TINY_TEXTS = (1, 2), (40, 60)
NAMES = ("memory", *SERIES)


def sweep_variants(name: str, *, tiny: bool = False) -> list[str]:
    """Return a sweep's ``--variant`` texts, ordered so that neighbours share an assembled model.

    ``memory`` is every batch of 1, 2, 4, 8 with every text of 100, 400, 1000, all layers recomputed, with cached
    features: it tests the planner.

    Raises:
        ConfigError: no such sweep.
    """
    if name == "memory":
        batches, texts = (_TINY_BATCHES, _TINY_TEXTS) if tiny else (_BATCHES, _TEXTS)
        return [
            tr(
                "batch-{b}-text-{t} preset=text={t} train.batch_size={b}"
                " train.gradient_checkpointing=all features=cached",
                b=b,
                t=t,
            )
            for b in batches
            for t in texts
        ]
    series = SERIES.get(name)
    if series is None:
        raise ConfigError(tr("no sweep `{name}`", name=name), hint=tr("one of {names}", names=", ".join(NAMES)))
    points = series.tiny if tiny else series.points
    return [f"{name}-{point} features=cached {series.words(point)}" for point in points]


def over_the_line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return inner points of (value, cost) by value, with their ratio to the straight line between their neighbours."""
    found = []
    ordered = sorted(points)
    for index in range(1, len(ordered) - 1):
        (x0, y0), (x1, y1), (x2, y2) = ordered[index - 1 : index + 2]
        line = y0 + (y2 - y0) * (x1 - x0) / (x2 - x0)
        found.append((x1, y1 / line))
    return found


def check_series(name: str, results: Results) -> dict[str, Any]:
    """Compare times and peaks of a series with the line between neighbours; saved in the record as ``check``."""
    rows = [(int(row["name"].rpartition("-")[2]), row) for row in results.rows if "error" not in row]
    found: dict[str, Any] = {"series": name, "allowed": MOST_OVER_FIT}
    for key in ("median_ms", "allocated_gib"):
        ratios = over_the_line([(value, row[key]) for value, row in rows])
        found[key] = [[value, round(ratio, 4)] for value, ratio in ratios]
        found[f"{key}_over"] = [value for value, ratio in ratios if ratio > MOST_OVER_FIT]
    results.record["check"] = found
    results.write()
    return found


def against_plan(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format measured and predicted peaks in GiB, and whether they agree within 5 % or 0.5 GiB, whichever is larger."""
    cells = []
    for row in rows:
        plan = row.get("plan")
        if "error" in row or not plan or "error" in plan:
            cells.append([row["name"], None, None, None, (row.get("error") or tr("no prediction"))[:60]])
            continue
        measured, said = row["reserved_gib"], plan["reserved_gib"]
        agrees = abs(said - measured) <= max(0.05 * measured, 0.5)
        cells.append([row["name"], f"{measured:.2f}", f"{said:.2f}", f"{100 * (said / measured - 1):+.1f} %",
                      "yes" if agrees else "NO"])  # fmt: skip
    return table(["reserved GiB", "measured", "plan", "off", "within"], cells)
