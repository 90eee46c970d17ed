"""Durations as people read them."""

from __future__ import annotations

from cogtune.language import tr


def format_duration(seconds: float) -> str:
    """Format an estimate in the unit that fits: ``45 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    if seconds < 90:
        return tr("{seconds:.0f} s", seconds=seconds)
    if seconds < 5400:
        return tr("{minutes:.0f} min", minutes=seconds / 60)
    if seconds < 48 * 3600:
        return tr("{hours:.1f} h", hours=seconds / 3600)
    return tr("{days:.1f} days", days=seconds / 86400)


def format_clock(seconds: float) -> str:
    """Format a countdown to the second: 3725 becomes ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
