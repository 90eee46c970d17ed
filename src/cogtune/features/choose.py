"""Decide whether a run trains from the cache (`data.cache_features: auto`), and give the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cogtune.errors import ConfigError
from cogtune.features.budget import Space
from cogtune.features.store import FeatureCacheError
from cogtune.language import tr


@dataclass(frozen=True)
class Demand:
    """A run's demand for tower outputs.

    Attributes:
        showings: how often the tower would run on a picture without a cache, over the rest of the run.
        pictures, to_compute: number of distinct pictures, and of those without features.
        more_bytes: disk space that their features take.
        tower_fits: whether the tower fits in memory during training; None: not known.
    """

    showings: int
    pictures: int
    to_compute: int
    more_bytes: int
    tower_fits: bool | None = None


@dataclass(frozen=True)
class CacheChoice:
    """``reason`` completes "features: cached, because ..." or "features: the tower runs in every step, because ..."."""

    cached: bool
    reason: str


def choose(
    asked: Literal["auto", "on"], demand: Demand, space: Space, budget: str, unwritable: str | None
) -> CacheChoice:
    """Decide before anything is computed.

    Raises:
        ConfigError, FeatureCacheError: ``on`` was requested and is not possible.
    """
    obstacle = None
    if demand.to_compute and unwritable is not None:
        obstacle = Obstacle(
            tr(
                "{unwritable} and {to_compute} pictures are not in it",
                unwritable=unwritable,
                to_compute=demand.to_compute,
            ),
            "cache-unwritable",
        )
    elif demand.to_compute and not space.fits(demand.more_bytes):
        obstacle = Obstacle(_too_large(demand, space, budget), "cache-budget")
    if asked == "on":
        if obstacle is not None:
            raise obstacle.error()
        return CacheChoice(True, tr("data.cache_features is on"))
    if obstacle is not None:
        return CacheChoice(False, obstacle.what)
    if demand.to_compute == 0:
        return CacheChoice(True, tr("all features are there"))
    if demand.tower_fits is False:
        return CacheChoice(True, tr("the vision tower and training do not fit in memory together"))
    if demand.showings <= demand.to_compute:
        return CacheChoice(
            False,
            tr(
                "it would run {showings} times, and filling the cache would run it {to_compute} times",
                showings=demand.showings,
                to_compute=demand.to_compute,
            ),
        )
    return CacheChoice(
        True,
        tr(
            "the vision tower would run {showings} times without it, and runs {to_compute} times to fill it",
            showings=demand.showings,
            to_compute=demand.to_compute,
        ),
    )


@dataclass(frozen=True)
class Obstacle:
    """A reason against the cache."""

    what: str
    code: str

    def error(self) -> Exception:
        if self.code == "cache-budget":
            return ConfigError(
                tr("data.cache_features is on, but {what}", what=self.what),
                hint=tr(
                    "raise data.cache_budget, choose a larger disk with data.cache_dir, set"
                    " data.cache_dtype: float8 (half the size), or data.cache_features: auto"
                ),
                code="cache-budget",
            )
        return FeatureCacheError(
            tr("data.cache_features is on, but {what}", what=self.what),
            hint=tr("choose a folder you may write with data.cache_dir, or fill it as a user who may"),
            code="cache-unwritable",
        )


def size_text(size: int) -> str:
    """Return bytes in decimal units: ``1.29 TB``, ``8.3 MB``."""
    for name, unit in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= unit:
            return f"{size / unit:.2f} {name}" if size < 10 * unit else f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"


def _too_large(demand: Demand, space: Space, budget: str) -> str:
    return tr(
        "{needed} of features do not fit data.cache_budget {budget}: that is {allowed},"
        " it takes {taken} of which {removable} can be removed, and {free} of its"
        " disk are free",
        needed=size_text(demand.more_bytes),
        budget=budget,
        allowed=size_text(space.budget),
        taken=size_text(space.taken),
        removable=size_text(space.evictable),
        free=size_text(space.free),
    ) + (tr("; {size} are reserved by runs that fill it now", size=size_text(space.reserved)) if space.reserved else "")
