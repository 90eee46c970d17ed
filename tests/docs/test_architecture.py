"""The architecture page names files, functions and classes that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from cogtune.configuration.keys import known_keys
from tests.docs.pages import ROOT, headings, name

PAGES = [ROOT / "docs" / "architecture.md", ROOT / "docs" / "zh" / "architecture.md"]
SOURCE = ROOT / "src" / "cogtune"
CODE = re.compile(r"`([^`]+)`")
OTHER = {"auto", "image_features", "chat", "predict"}
"""Code on the page that is no name in a file: a value, a batch's entry, commands."""


def items(text: str) -> list[str]:
    """Numbered items and rows of tables, each with its continued lines, and paragraphs that name a file."""
    listed = re.compile(r"^(?:\d+\. |\| ).*(?:\n {2,}\S.*)*", re.M)
    paragraphs = [part for part in listed.sub("", text).split("\n\n") if re.search(r"`[\w/]+\.py`", part)]
    return [*listed.findall(text), *paragraphs]


@cache
def defined(file: Path) -> frozenset[str]:
    """Functions, classes and ``Class.member`` of a source file."""
    found = set[str]()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return frozenset(found)


def unknown(text: str) -> list[str]:
    """Files that are not there, and names that no file of the same item defines."""
    wrong = list[str]()
    for item in items(text):
        codes = CODE.findall(item)
        places = [
            code for code in codes if re.fullmatch(r"[\w/]+(?:/|\.py|\.toml)", code) and not code.startswith("output/")
        ]
        wrong += [place for place in places if not any((root / place).exists() for root in (SOURCE, ROOT))]
        files = [SOURCE / place for place in places if place.endswith(".py") and (SOURCE / place).is_file()]
        names = [code for code in codes if re.fullmatch(r"[A-Za-z]\w+(?:\.\w+)?", code) and code not in places]
        known = OTHER | set(known_keys()) | {found for file in files for found in defined(file)}
        wrong += [code for code in names if code not in known]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_functions_exist(page):
    text = page.read_text(encoding="utf-8")
    assert len(items(text)) > 50
    assert unknown(text) == []


def test_a_name_that_moved_is_found():
    assert unknown("1. `collate` in `data/collate.py`, `Loop` in `train/loop.py`\n") == []
    assert unknown("1. `collated` in `data/collate.py`\n   and `data/gone.py`\n") == ["data/gone.py", "collated"]
    assert unknown("1. `collate` in `train/loop.py`, `Feed.stop` in `train/batches.py`\n") == ["collate", "Feed.stop"]


def test_both_languages_name_the_same():
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    assert [sorted(CODE.findall(item)) for item in items(english)] == [sorted(CODE.findall(i)) for i in items(chinese)]
    assert len(headings(english)) == len(headings(chinese))
