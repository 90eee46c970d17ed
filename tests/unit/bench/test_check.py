"""The record names what was measured, and today's rows are compared with its last entry for the card."""

from __future__ import annotations

import json

import pytest

from benchmarks.check import COMMANDS, DECODING, RECORD, TRAINING, compare, report
from cogtune.bench.variants import parse_variants
from tests.docs.pages import ROOT

ENTRIES = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['row']} {entry['commit']}")
def test_an_entry_is_the_number_of_the_place_it_names(entry):
    if entry["source"] == "log":
        numbers = (ROOT / "docs" / "log.md").read_text(encoding="utf-8").replace("|", " ").split()
        assert f"{entry['ms']:.1f}" in {number.strip(",.;()") for number in numbers}
        return
    measured = json.loads((RECORD.parent / f"{entry['source']}.json").read_text(encoding="utf-8"))
    (row,) = [row for row in measured["rows"] if row["name"] == entry["row"]]
    assert entry["ms"] == round(row.get("median_ms", row.get("step_ms")), 2)
    assert (measured["card"], measured["commit"][:7]) == (entry["card"], entry["commit"][:7])


def test_the_steps_that_are_measured_are_variants_of_bench():
    words = COMMANDS["steps"]
    texts = [words[index + 1] for index, word in enumerate(words) if word == "--variant"]
    variants = parse_variants(texts, {}, preset="s400", cached=False)
    names = "live", "cached", "rank16", "fp8-cached", "fp8-live", "nf4", "nf4-streamed"
    assert [variant.name for variant in variants] == list(names)


def row(name, ms):
    return {"name": name, "median_ms": ms, "min_ms": ms * 0.99, "max_ms": ms * 1.01}


RECORDED = [
    {"row": "baseline", "ms": 1000.0, "card": "A"},
    {"row": "cached", "ms": 150.0, "card": "A"},
    {"row": "cached", "ms": 100.0, "card": "A"},
    {"row": "cached", "ms": 50.0, "card": "B"},
    {"row": "engine x1", "ms": 5.0, "card": "A"},
]


def moved(cached, baseline=1000.0, decode=5.0):
    measured = [row("baseline", baseline), row("cached", cached), {"name": "engine x1", "step_ms": decode}]
    said = report(compare(measured, RECORDED, "A"), [])
    return said.splitlines()[-1]


def test_a_row_has_moved_beyond_the_allowance():
    assert moved(100 * (1 + TRAINING) - 0.1) == "nothing moved"
    assert moved(100 * (1 + TRAINING) + 0.1) == "moved: cached"
    assert moved(100 * (1 - TRAINING) - 0.1) == "moved: cached"


def test_a_slower_card_is_no_move_of_a_training_row_and_no_excuse_for_decoding():
    assert moved(110.0, baseline=1100.0) == "nothing moved"
    assert moved(100.0, baseline=1100.0) == "moved: cached"
    assert moved(100.0, decode=5 * (1 + DECODING) + 0.01) == "moved: engine x1"


def test_a_card_without_a_record_and_a_failed_row_are_said():
    rows = compare([row("cached", 1.0)], RECORDED, "C")
    assert "no record on this card" in report(rows, [])
    assert "failed: nf4: OutOfMemoryError" in report(rows, [{"name": "nf4", "error": "OutOfMemoryError: ..."}])
