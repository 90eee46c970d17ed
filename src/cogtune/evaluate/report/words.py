"""Texts of the report: every word of ours in both languages, and everything from data or models made harmless."""

from __future__ import annotations

from html import escape
from typing import Any

from cogtune.evaluate.text import visible
from cogtune.language import Language, speaking, tr

LANGUAGES: tuple[Language, ...] = ("en", "zh")


def shown(text: str) -> str:
    """Return text of data or a model as HTML: escaped, control characters (as of terminals) as visible signs."""
    return escape(visible(text).encode("utf-8", "replace").decode("utf-8"))


def both(template: str, /, **values: Any) -> str:
    """Return a message of ours in both languages, of which the page shows one; texts among the values are escaped."""
    return pair(*(in_language(language, template, **values) for language in LANGUAGES))


def pair(english: str, chinese: str) -> str:
    """Return HTML that the page shows in the language that was chosen."""
    if english == chinese:
        return english
    return f'<span lang="en">{english}</span><span lang="zh">{chinese}</span>'


def plain(template: str, /, **values: Any) -> str:
    """Return both languages in one text, for attributes that cannot be switched (labels for screen readers)."""
    said = [in_language(language, template, **values) for language in LANGUAGES]
    return said[0] if said[0] == said[1] else " / ".join(said)


def in_language(name: Language, template: str, /, **values: Any) -> str:
    """Return a message of ours in one language; texts among the values are escaped."""
    with speaking(name):
        return tr(template, **{key: shown(value) if isinstance(value, str) else value for key, value in values.items()})


def number(value: float, digits: int = 1) -> str:
    """Return a number as tables show it."""
    return f"{value:,.{digits}f}"
