"""Processes that fill one cache: an error of any ends all of them, at the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from cogtune.checkpoint.resume_state import is_disk_full
from cogtune.errors import CogtuneError, DiskFullError, RunError, Stopped
from cogtune.features.store import FeatureCacheError

T = TypeVar("T")
_CONTINUES = "what was computed stays: run the same command again and it goes on from there"


class Ranks(Protocol):
    """What `train.engines.group.Group` gives."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather(self, value: T) -> list[T]: ...
    def on_main(self, work: Callable[[], T]) -> T: ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def on_main(self, work: Callable[[], T]) -> T:
        return work()


def together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Every process's ``work()``; if it failed in any, the first error, on every process."""
    mine: Exception | None = None
    value: T | None = None
    try:
        value = work()
    except Exception as error:
        mine = _named(error)
    outcomes = ranks.gather((value, None if mine is None else _portable(mine, ranks.rank)))
    errors = [error for _, error in outcomes if error is not None]
    if mine is not None:
        raise mine
    if errors:
        raise errors[0]
    return [value for value, _ in outcomes]  # type: ignore[misc]


def _named(error: Exception) -> Exception:
    """The system's errors about files as ours."""
    if isinstance(error, Stopped):
        return Stopped(error.exit_code - 128, f"{error.message}; the feature cache is half filled", hint=_CONTINUES)
    if is_disk_full(error):
        named: CogtuneError = DiskFullError(
            f"no space left while filling the feature cache ({error}); what was computed before is stored",
            hint=f"free some space, or lower data.cache_budget so that less is kept, or set data.cache_features: off;"
            f" {_CONTINUES}",
        )
    elif isinstance(error, OSError):
        named = FeatureCacheError(
            f"the feature cache cannot be written: {error}",
            hint="choose a folder you may write with data.cache_dir, or set data.cache_features: off",
            code="cache-unwritable",
        )
    else:
        return error
    named.__cause__ = error
    return named


def _portable(error: Exception, rank: int) -> CogtuneError:
    """For the other processes: ours with its message, hint and code, any other by its text."""
    if isinstance(error, CogtuneError):
        return error
    return RunError(f"rank {rank} failed: {type(error).__name__}: {error}")
