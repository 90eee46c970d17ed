"""What a measurement says of where it ran: cores, versions of libraries, the commit of the code."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this runs from, or of the file COMMIT beside it where git's folder did not travel.

    None for an installed package.
    """
    marker = _ROOT / "COMMIT"
    if marker.is_file():
        return marker.read_text(encoding="utf-8").strip()
    try:
        asked = subprocess.run(["git", "-C", str(_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return asked.stdout.strip() or None
