"""Texts as the metrics compare them: normalised, and divided into words.

Chinese and Japanese are written without blanks between words, so each of their characters counts as a word. No
dictionary is asked: the same text is divided the same way on every machine and in every version.
"""

from __future__ import annotations

import re
import unicodedata

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_HAS_CJK = re.compile(f"[{_CJK}]")
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_BLANK_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_NUMBER_MARK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<![\w.])-(?=\.?\d)")
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ufeff]")
_ARTICLES = frozenset({"a", "an", "the"})


def has_cjk(text: str) -> bool:
    """Whether a text has Chinese or Japanese characters."""
    return _HAS_CJK.search(text) is not None


def visible(text: str) -> str:
    """Return a text whose control characters, such as a terminal's escapes, are visible signs."""
    return _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 0x20 else "\ufffd", text)


def words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation; a Chinese or Japanese character is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def written_words(text: str) -> list[str]:
    """Return the words of a text as they are written, punctuation and case included, for reading tasks."""
    return _BLANK_WORD.findall(text)


def normalise(text: str) -> str:
    """Return a text as exact match compares it, by SQuAD's rule: lower case, without punctuation and English articles.

    Differs from that rule where it makes different answers equal: marks inside numbers stay (3.5, 10:30, -1), an
    answer that is an article alone stays ("A"), and full-width characters are those they stand for.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = {match.start() for match in _NUMBER_MARK.finditer(text)}
    parts = "".join(c for at, c in enumerate(text) if at in kept or not _is_punctuation(c)).split()
    return " ".join([part for part in parts if part not in _ARTICLES] or parts)


def _is_punctuation(character: str) -> bool:
    """As ``string.punctuation``, in every script."""
    return unicodedata.category(character)[0] == "P" or character in "$+<=>^`|~"
