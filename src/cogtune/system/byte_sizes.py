"""Sizes of memory and disk as people write them."""

from __future__ import annotations

import re

from cogtune.language import tr

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_UNITS = {"b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*")


def parse_size(text: str) -> int:
    """Return the bytes in ``text``: a number with a unit such as ``30GiB`` (2^30) or ``30 GB`` (10^9), in any case.

    Raises:
        ValueError: not such a size, or not more than 0.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(tr("`{text}` is not a size; write a number and its unit, such as 30GiB or 30GB", text=text))
    size = round(float(match[1]) * unit)
    if size < 1:
        raise ValueError(tr("`{text}` is zero bytes; a size must be more than 0", text=text))
    return size


def format_size(size: float) -> str:
    """Format ``size`` bytes in the largest unit that fits, with one decimal below 100: ``10.3 GiB``."""
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= unit:
            value = size / unit
            return f"{value:.1f} {name}" if value < 100 else f"{value:.0f} {name}"
    return f"{size:.0f} B"
