"""Decide whether a run trains from the cache (`data.cache_features: auto`), and give the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cogtune.errors import ConfigError
from cogtune.features.budget import Space
from cogtune.features.store import FeatureCacheError


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
        obstacle = Obstacle(f"{unwritable} and {demand.to_compute} pictures are not in it", "cache-unwritable")
    elif demand.to_compute and not space.fits(demand.more_bytes):
        obstacle = Obstacle(_too_large(demand, space, budget), "cache-budget")
    if asked == "on":
        if obstacle is not None:
            raise obstacle.error()
        return CacheChoice(True, "data.cache_features is on")
    if obstacle is not None:
        return CacheChoice(False, obstacle.what)
    if demand.to_compute == 0:
        return CacheChoice(True, "all features are there")
    if demand.tower_fits is False:
        return CacheChoice(True, "the tower does not fit beside training")
    if demand.showings <= demand.to_compute:
        return CacheChoice(
            False,
            f"it would run {demand.showings} times, and filling the cache would run it {demand.to_compute} times",
        )
    return CacheChoice(
        True, f"the tower would run {demand.showings} times without it, and runs {demand.to_compute} times to fill it"
    )


@dataclass(frozen=True)
class Obstacle:
    """A reason against the cache."""

    what: str
    code: str

    def error(self) -> Exception:
        if self.code == "cache-budget":
            return ConfigError(
                f"data.cache_features is on, but {self.what}",
                hint="raise data.cache_budget, choose a larger disk with data.cache_dir, set data.cache_dtype: float8 "
                "(half the size), or data.cache_features: auto",
                code="cache-budget",
            )
        return FeatureCacheError(
            f"data.cache_features is on, but {self.what}",
            hint="choose a folder you may write with data.cache_dir, or fill it as a user who may",
            code="cache-unwritable",
        )


def size_text(size: int) -> str:
    """Return bytes in decimal units: ``1.29 TB``, ``8.3 MB``."""
    for name, unit in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= unit:
            return f"{size / unit:.2f} {name}" if size < 10 * unit else f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"


def _too_large(demand: Demand, space: Space, budget: str) -> str:
    return (
        f"{size_text(demand.more_bytes)} of features do not fit data.cache_budget {budget}: that is "
        f"{size_text(space.budget)}, it takes {size_text(space.taken)} of which {size_text(space.evictable)} can "
        f"be removed, and {size_text(space.free)} of its disk are free"
        + (f"; {size_text(space.reserved)} are reserved by runs that fill it now" if space.reserved else "")
    )
