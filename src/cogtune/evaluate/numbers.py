"""Numbers in answers: the one number that a text names."""

from __future__ import annotations

import re
import unicodedata

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|(?<![\w.])[-+]?\.\d+", re.I)
_TO_TEN = (
    ("zero", "none", "零"), ("one", "一"), ("two", "二", "两"), ("three", "三"), ("four", "四"), ("five", "五"),
    ("six", "六"), ("seven", "七"), ("eight", "八"), ("nine", "九"), ("ten", "十"),
)  # fmt: skip
_NAMES = {name: float(value) for value, names in enumerate(_TO_TEN) for name in names}


def find_number(text: str) -> float | None:
    """Return the number of a text that names exactly one, else None.

    ``1,200 people`` is 1200, ``5 %`` is 0.05, and ``three`` or ``三`` is 3.
    """
    text = unicodedata.normalize("NFKC", text).strip().lower()
    bare = text.strip(".!。个只条张 ")
    if bare in _NAMES:
        return _NAMES[bare]
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    value = float(found[0][0].replace(",", ""))
    return value / 100 if text[found[0].end() :].lstrip().startswith("%") else value


def is_close(answer: str, reference: str, tolerance: float) -> bool:
    """Whether two texts name numbers that differ by at most ``tolerance`` of the reference; else, the same text."""
    given, right = find_number(answer), find_number(reference)
    if given is None or right is None:
        return given == right and answer.strip().lower() == reference.strip().lower()
    return abs(given - right) <= tolerance * abs(right)
