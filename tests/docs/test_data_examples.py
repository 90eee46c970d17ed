"""The records shown in the documentation are ones that the package reads."""

from __future__ import annotations

import json

import pytest

from cogtune.data.record_json import parse_json, record_dialogues
from tests.docs.pages import ROOT, blocks, name

PAGES = [ROOT / place for place in ("README.md", "README_zh.md", "docs/guides/data.md", "docs/zh/guides/data.md")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_label_files_are_read(page):
    shown = [block.body for block in blocks(page.read_text(encoding="utf-8")) if block.language == "json"]
    assert shown
    for body in shown:
        root, repaired = parse_json(body.encode())
        assert not repaired
        for record in root if isinstance(root, list) else [root]:
            assert record_dialogues(record, "Describe this image in detail.")


@pytest.mark.parametrize("page", PAGES[2:], ids=name)
def test_lines_are_read(page):
    lines = [block.body for block in blocks(page.read_text(encoding="utf-8")) if block.language == "jsonl"]
    records = [json.loads(line) for body in lines for line in body.splitlines()]
    assert {type(record["image"]) for record in records} == {str, type(None)}
    for record in records:
        assert record_dialogues(record, None)
