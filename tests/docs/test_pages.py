"""Pages fit together: links resolve, Chinese pages follow the English ones, nothing private is in the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, SHELL, anchors, blocks, chinese_twin, headings, inline_code, links, name, pages

PAGES = pages()
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))
TEST_FUNCTIONS = {found for file in TEST_FILES for found in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
TRANSLATED = [page for page in PAGES if chinese_twin(page) is not None]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{name(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_tests_named_exist(page):
    """Paths of the repository in inline code, and the test functions named beside them."""
    codes = inline_code(page.read_text(encoding="utf-8"))
    for code in codes:
        if re.fullmatch(r"(?:src/cogtune|tests|configs|scripts|docs)/[\w/.-]*", code):
            assert (ROOT / code).exists(), f"{name(page)}: {code}"
    for function in filter(re.compile(r"test_\w+").fullmatch, codes):
        assert function in TEST_FUNCTIONS, f"{name(page)}: {function}"


@pytest.mark.parametrize("page", TRANSLATED, ids=name)
def test_chinese_page_follows_the_english_one(page):
    twin = chinese_twin(page)
    assert twin is not None
    assert twin.is_file(), f"{name(page)} has no Chinese version {name(twin)}"
    english, chinese = page.read_text(encoding="utf-8"), twin.read_text(encoding="utf-8")
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert [code_of(block) for block in blocks(chinese)] == [code_of(block) for block in blocks(english)]


def test_every_chinese_page_has_an_english_one():
    twins = {chinese_twin(page) for page in TRANSLATED}
    extra = [name(page) for page in PAGES if ("zh" in page.parts or page.stem.endswith("_zh")) and page not in twins]
    assert not extra


def code_of(block):
    """What has to be equal in two languages: code without its comments; of texts and records only that they are
    there."""
    if block.language in (*SHELL, "yaml", "python"):
        return block.language, [re.sub(r"(^|\s)#.*$", "", line).strip() for line in block.body.splitlines()]
    return block.language, [] if block.language in ("", "text", "json", "jsonl") else block.body


def tracked_texts() -> list[tuple[Path, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode()
    if not listed:
        pytest.skip("not a git checkout")
    found = []
    for place in filter(None, listed.split("\0")):
        path = ROOT / place
        if path.is_file():
            try:
                found.append((path, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


# A developer's home, temporary files, private addresses and host names have no business in what others clone.
PRIVATE = re.compile(
    r"(?<![\w.~}*])/(?:root|work|home/[a-z]|Users/[A-Z]|mnt/[a-z]|opt/[a-z])[\w/.-]*"
    r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}(?:\.\d{1,3})?\b"
    r"|\b[\w-]+\.(?:internal|local|corp|lan)\b(?!\()"
)


REFUSES_ADDRESSES = "tests/unit/serve/test_pictures.py"
"""Its addresses are examples of private networks, from which a server must not fetch."""


def test_nothing_private_is_tracked():
    found = [(name(path), match[0]) for path, text in tracked_texts() for match in PRIVATE.finditer(text)]
    assert [hit for hit in found if hit[0] != REFUSES_ADDRESSES or not re.fullmatch(r"[\d.]+", hit[1])] == []


def test_docstrings_are_in_one_style():
    """Google's: no fields or roles of Sphinx."""
    sphinx = re.compile(r"^ *:(param|raises?|returns?|rtype|type)\b|:(func|class|meth|data|mod|attr|exc):`", re.M)
    files = [file for folder in ("src", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert not [name(file) for file in files if sphinx.search(file.read_text(encoding="utf-8"))]
