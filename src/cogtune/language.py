"""What a user reads, in the user's language.

A message is an English template with named values, where it is said; its Chinese twin has the same names and is kept
in ``zh/<package>.toml`` beside this file, under the English template:

    tr("{path}: {count} pictures are missing", path=path, count=missing)

    "{path}: {count} pictures are missing" = "{path}：缺少 {count} 张图片"

Values are formatted as `str.format` does (``{share:.1f}``), and a value named ``s`` (English plurals) may be left out
in Chinese. A template without values is taken as it stands; in others a brace is written twice. A template that is kept
in a table first is marked there with `phrase`. Help texts of commands, flags and configuration keys are such templates
without a mark.

What programs read (``--json``, JSON lines, an API's answers) stays English: see `english`.
"""

from __future__ import annotations

import os
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Literal

VARIABLE = "COGTUNE_LANG"
LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")
LANGUAGES = ("en", "zh")

Language = Literal["en", "zh"]
_spoken: ContextVar[Language | None] = ContextVar("spoken", default=None)


def language() -> Language:
    """Return the language of messages: that of ``COGTUNE_LANG``, else of the locale's variables, else English."""
    spoken = _spoken.get()
    if spoken is not None:
        return spoken
    names = (VARIABLE, *LOCALE_VARIABLES)
    asked = next((value for name in names if (value := os.environ.get(name))), "")
    return "zh" if short_name(asked) == "zh" else "en"


def short_name(language: str) -> str:
    """``zh_CN.UTF-8`` -> ``zh``."""
    return language.replace("-", "_").replace(".", "_").split("_")[0].lower()


@contextmanager
def english() -> Iterator[None]:
    """Make `tr` English inside, also in threads and processes that start there, for what programs read."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "en"
    try:
        with speaking("en"):
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@contextmanager
def speaking(name: Language) -> Iterator[None]:
    """Make `tr` speak this language inside, whatever the user's is: for a page that has both."""
    token = _spoken.set(name)
    try:
        yield
    finally:
        _spoken.reset(token)


def tr(template: str, /, **values: object) -> str:
    """Return the message in the user's language.

    Args:
        template: its English text, with ``{name}`` where a value stands.
        values: the values by name.

    Raises:
        KeyError: the template names a value that is not given.
    """
    if language() == "zh":
        template = chinese().get(template, template)
    return template.format(**values) if values else template


def html_language() -> str:
    """Return the language of a page for its ``lang`` attribute."""
    return {"en": "en", "zh": "zh-CN"}[language()]


def phrase(template: str) -> str:
    """Mark a template that `tr` gets later, so that the tests look for its twin."""
    return template


@cache
def chinese() -> dict[str, str]:
    """Return every English template with its Chinese twin."""
    import tomllib  # only messages in Chinese need it

    found: dict[str, str] = {}
    for file in resources.files("cogtune").joinpath("zh").iterdir():
        if file.name.endswith(".toml"):
            found |= tomllib.loads(file.read_text(encoding="utf-8"))
    return found


def width(shown: str) -> int:
    """Return how many columns of a terminal ``shown`` takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in shown)


def wrapped(shown: str, columns: int, indent: str = "") -> list[str]:
    """Break ``shown`` into lines of at most ``columns`` columns, each with ``indent`` in front.

    Chinese breaks between any two characters, but for punctuation, which does not begin a line.
    """
    if width(shown) == len(shown):
        return textwrap.wrap(shown, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    lines, line = [], indent
    for piece in _PIECE.findall(shown):
        if width(line) + width(piece.rstrip()) > columns and line.strip():
            lines.append(line.rstrip())
            line = indent + piece.lstrip()
        else:
            line += piece
    return [*lines, line.rstrip()]


_PIECE = re.compile(r"(?:[\u2e80-\u9fff\uff00-\uffef]|[^\s\u2e80-\u9fff\uff00-\uffef]+)[，。；：、！？）》”]*\s*|\s+")
"""What stays together in a line: a Chinese character or a Latin word, with the punctuation and blanks after it."""


def padded(shown: str, columns: int) -> str:
    """Return ``shown`` with blanks after it, so that it takes at least ``columns`` columns of a terminal."""
    return shown + " " * (columns - width(shown))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose cells stand below each other on a terminal."""
    widths = [max(width(row[at]) for row in rows) for at in range(len(rows[0]))] if rows else []
    return [
        "  ".join(padded(cell, columns) for cell, columns in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
