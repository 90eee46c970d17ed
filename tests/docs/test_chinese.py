"""Chinese pages keep a paragraph on one line, where a break would show as a blank, and one word for one thing."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import name, pages, without_blocks

PAGES = [page for page in pages() if page.stem.endswith("_zh") or "zh" in page.parts]
STARTS = re.compile(r"\s*(?:[-*+] |\d+\. |#|\||>|!\[)|<!--.*-->\s*$")
"""What begins a line of its own: items, headings, tables, quotations, pictures, marks that stand alone."""
OTHER_WORDS = {
    "底座": "基座模型", "词元": "token", "您": "你", "断点续训": "续训", "内核": "核函数",
    "4 位": "4 比特", "8 位的": "8 比特的", "官方演示": "官方示例",
}  # fmt: skip
"""Words that were used beside the one that stays."""


def broken_lines(text: str) -> list[str]:
    """Lines of prose that continue the line above them."""
    found, in_paragraph = [], False
    for line in without_blocks(text).split("\n"):
        starts = STARTS.match(line) is not None
        if in_paragraph and line.strip() and not starts:
            found.append(line)
        # below a heading, a table's row or a mark nothing is continued, below an item or prose it is
        in_paragraph = bool(line.strip()) and not re.match(r"\s*(?:#|\||!\[)|<!--.*-->\s*$", line)
    return found


def test_a_broken_paragraph_and_a_broken_item_are_found():
    text = "# 标题\n一行\n又一行\n\n- 一项\n  还是它\n- 另一项\n\n"
    text += "```text\na\nb\n```\n| a |\n| b |\n<!-- result: x -->\n一行\n"
    assert broken_lines(text) == ["又一行", "  还是它"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_paragraph_is_one_line(page):
    assert broken_lines(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "errors.md"], ids=name)
def test_one_word_for_one_thing(page):
    text = page.read_text(encoding="utf-8")
    assert {word: better for word, better in OTHER_WORDS.items() if word in text} == {}
