"""Facts about the machine: cores, host memory, library versions, commit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""The folders of control groups of version 2 and 1, with their files for the limit and the use."""


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Return the bytes of host memory that this process can still take: what Linux reports as available, and what the
    limit of its control group (a container's) leaves; None on other systems.
    """
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    lines = file.read_text(encoding="ascii", errors="ignore").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, limit, used in _CONTROL_GROUPS:
        most, taken = (_number(folder / name) for name in (limit, used))
        if most is not None and taken is not None:
            found.append(max(0, most - taken + _reclaimable(folder / "memory.stat")))
    return min(found, default=None)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # version 2 writes "max" for no limit


def _reclaimable(file: Path) -> int:
    """Return the bytes of cached files that a control group counts as used and gives up on demand."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def resident_memory() -> int | None:
    """Return the bytes of host memory that this process holds now; None where the system has no ``/proc``."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of these libraries."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the checkout's commit, or that in its file COMMIT if there is no .git folder; None for an installed
    package.
    """
    marker = _ROOT / "COMMIT"
    if marker.is_file():
        return marker.read_text(encoding="utf-8").strip()
    try:
        asked = subprocess.run(["git", "-C", str(_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return asked.stdout.strip() or None
