"""The cache's disk budget, and eviction of features that no run needs."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cogtune.features.lease import Lease, leased
from cogtune.features.ownership import is_features, label
from cogtune.features.store import CachedFile, scan
from cogtune.system.byte_sizes import parse_size

_HEADROOM = 2**30  # always left free on the disk, for the checkpoints of a running training


@dataclass(frozen=True)
class Space:
    """Bytes used by the cache, free on its disk, allowed by the budget, evictable, and reserved by runs that are
    filling it."""

    taken: int
    free: int
    budget: int
    evictable: int
    victims: tuple[CachedFile, ...]
    """Evictable files, least recently used first."""
    reserved: int = 0

    def excess(self, more: int) -> int:
        """Return the bytes to evict before ``more`` bytes fit; more than ``evictable`` if they cannot fit."""
        wanted = self.reserved + more
        return max(self.taken + wanted - self.budget, wanted - self.free, 0)

    def fits(self, more: int) -> bool:
        return self.excess(more) <= self.evictable


def measure(root: Path, budget: str, needed: Collection[str], own: Lease | None = None) -> Space:
    """Measure the cache. ``needed`` files (``variant/digest``) and those that leases other than ``own`` hold are not
    evictable."""
    files = scan(root)
    taken = sum(file.size for file in files)
    free = max(0, shutil.disk_usage(_existing(root)).free - _HEADROOM)
    held, names = leased(root, own), set(needed)
    victims = [file for file in files if not (label(file.path) in names or held.holds(label(file.path), file.used))]
    victims.sort(key=lambda file: file.used)
    evictable = sum(file.size for file in victims)
    return Space(taken, free, _limit(budget, taken + free), evictable, tuple(victims), held.reserved)


def evict(space: Space, more: int) -> tuple[int, int]:
    """Remove victims until ``more`` bytes fit; return the number of files and bytes removed."""
    count = size = 0
    excess = space.excess(more)
    for file in space.victims:
        if size >= excess:
            break
        with suppress(PermissionError):  # another user's file in a folder that we cannot write to
            if is_features(file.path):
                file.path.unlink(missing_ok=True)
                count, size = count + 1, size + file.size
    return count, size


def _limit(budget: str, available: int) -> int:
    if budget.endswith("%"):
        return int(available * float(budget.removesuffix("%")) / 100)
    return parse_size(budget)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
