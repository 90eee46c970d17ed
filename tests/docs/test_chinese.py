"""Chinese pages keep a paragraph on one line, where a break would show as a blank, and one word for one thing."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, name, pages, without_blocks

PAGES = [page for page in pages() if page.stem.endswith("_zh") or "zh" in page.relative_to(ROOT).parts]
STARTS = re.compile(r"\s*(?:[-*+] |\d+\. |#|\||>|!\[)|<!--.*-->\s*$")
"""What begins a line of its own: items, headings, tables, quotations, pictures, marks that stand alone."""
GLOSSARY = ROOT / "CONTRIBUTING_zh.md"


def other_words() -> dict[str, str]:
    """Words that the glossary's third column rules out, and the one that stays."""
    rows = re.findall(r"^\| [^|]* \| ([^|]*) \| ([^|]*?) ?\|$", GLOSSARY.read_text(encoding="utf-8"), re.M)
    return {
        word: better for better, words in rows[1:] for word in words.split("、") if re.search("[\u4e00-\u9fff]", word)
    }


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


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "errors.md" and page != GLOSSARY], ids=name)
def test_one_word_for_one_thing(page):
    text = page.read_text(encoding="utf-8")
    assert {word: better for word, better in other_words().items() if word in text} == {}


@pytest.mark.parametrize("file", sorted((ROOT / "src/cogtune/zh").glob("*.toml")), ids=lambda file: file.stem)
def test_messages_use_the_same_words(file):
    text = file.read_text(encoding="utf-8")
    assert {word: better for word, better in other_words().items() if word in text} == {}


def test_the_glossary_is_read():
    assert other_words()["底座"] == "基座模型（简称基座）"
    assert {"您", "内核", "4 位"} <= other_words().keys()
