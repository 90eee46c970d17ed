"""The table of cards, made from a result file."""

from __future__ import annotations

import json

from benchmarks import render as rendering
from benchmarks.card_view import CARDS, cards, split_name
from cogtune.bench.card_memory import ROWS
from tests.docs.pages import ROOT

CONTENT = {
    "card": "NVIDIA H100 80GB HBM3",
    "date": "2026-11-25T09:00:00",
    "versions": {"torch": "2.11"},
    "command": "cogtune bench fit",
    "rows": [
        {
            "name": "fill",
            "command": "cogtune bench fill --pictures 16",
            "error": "no such card\nmore",
        },
        {
            "name": "bf16-cached-r8",
            "command": "cogtune bench train --preset s400 --steps 18 --warmup 2 --features cached --model.path X",
            "peak_reserved_gib": 40.123,
            "samples_per_second": 6.5,
        },
    ],
}


def test_a_row_of_each_kind():
    text = cards(CONTENT, False)
    assert "| 48 GB | bf16-cached | 8 | 40.12 | 6.50 | `--data.cache_features on` |" in text
    assert "failed: no such card" in text
    assert text.index("12 GB") < text.index("48 GB")
    assert "失败" in cards(CONTENT, True)


def test_a_mark_names_the_view(tmp_path):
    (tmp_path / "fit-h100.json").write_text(json.dumps(CONTENT), encoding="utf-8")
    text = "<!-- result?: fit-h100 cards -->\n<!-- end -->"
    assert "| 48 GB | bf16-cached |" in rendering.render(text, tmp_path)


def test_every_setting_that_is_measured_has_its_card_and_recipes_exist():
    assert {split_name(name)[0] for name in ROWS} == set(CARDS)
    assert all((ROOT / "configs" / recipe).is_file() for _, recipe in CARDS.values() if recipe)
