"""Statistics of texts: lengths, languages, and how evenly short answers are distributed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cogtune.language import phrase

_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SCRIPTS = {
    phrase("Japanese"): re.compile(r"[\u3040-\u30ff]"),
    phrase("Korean"): re.compile(r"[\uac00-\ud7af]"),
    phrase("Chinese"): re.compile(r"[\u3400-\u9fff]"),
    phrase("Cyrillic"): re.compile(r"[\u0400-\u04ff]"),
    phrase("Arabic"): re.compile(r"[\u0600-\u06ff]"),
    phrase("Devanagari"): re.compile(r"[\u0900-\u097f]"),
    phrase("Thai"): re.compile(r"[\u0e00-\u0e7f]"),
    phrase("Latin"): re.compile(r"[A-Za-z\u00c0-\u024f]"),
}
_NO_SCRIPT = phrase("none")
_CLOSED_WORDS, _CLOSED_CHARACTERS = 3, 24
_TRACKED = 100_000


@dataclass
class Histogram:
    """Counts per range; ``counts[i]`` covers ``edges[i - 1]`` up to, not including, ``edges[i]``."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_EDGES) + 1))
    total: int = 0
    number: int = 0
    most: int = 0

    def add(self, value: int) -> None:
        self.counts[next((place for place, edge in enumerate(_EDGES) if value < edge), len(_EDGES))] += 1
        self.total += value
        self.number += 1
        self.most = max(self.most, value)

    def ranges(self) -> list[tuple[str, int]]:
        """Return ``(range, count)`` from the first to the last non-empty range."""
        low = (0, *_EDGES)
        names = [f"{a}" if b - a == 1 else f"{a}-{b - 1}" for a, b in zip(low, _EDGES, strict=False)]
        names.append(f"{_EDGES[-1]}+")
        used = [place for place, count in enumerate(self.counts) if count]
        return [(names[place], self.counts[place]) for place in range(used[0], used[-1] + 1)] if used else []

    def to_dict(self) -> dict[str, Any]:
        mean = self.total / self.number if self.number else 0.0
        return {"mean": round(mean, 1), "most": self.most, "ranges": dict(self.ranges())}


@dataclass
class Answers:
    """Distribution of answers. Closed answers are short and few, so that the count of each matters."""

    counts: Counter[str] = field(default_factory=Counter)
    long: int = 0

    def add(self, answer: str) -> None:
        text = answer.strip().rstrip(".!。！").lower()
        short = len(text) <= _CLOSED_CHARACTERS and len(text.split()) <= _CLOSED_WORDS
        if short and (text in self.counts or len(self.counts) < _TRACKED):
            self.counts[text] += 1
        else:
            self.long += 1

    @property
    def closed(self) -> bool:
        """Whether the data asks for one of a few answers: most are short, and each occurs ten times on average."""
        short = self.counts.total()
        return short > self.long and short >= 10 * len(self.counts)

    def to_dict(self, limit: int = 20) -> dict[str, Any]:
        total = self.counts.total()
        shares = {answer: round(count / total, 4) for answer, count in self.counts.most_common(limit)} if total else {}
        return {
            "closed": self.closed,
            "different": len(self.counts),
            "short": total,
            "long": self.long,
            "shares": shares,
        }


def script_of(text: str) -> str:
    """Return the script of most of the text's letters; kana mean Japanese, ``none`` means no letters."""
    if text.isascii():
        return "Latin" if _SCRIPTS["Latin"].search(text) else _NO_SCRIPT
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Chinese")
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else _NO_SCRIPT


def scripts(texts: Iterable[str]) -> Counter[str]:
    return Counter(script_of(text) for text in texts)
