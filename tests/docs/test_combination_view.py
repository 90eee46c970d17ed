"""The table of engines and settings leaves out no rule."""

from __future__ import annotations

import pytest

from benchmarks.combination_view import ROWS, combinations
from cogtune.configuration.engine_rules import RULES
from cogtune.language import chinese as twins


def test_every_refused_value_has_a_row() -> None:
    for rule in RULES:
        shown = [key for key in rule.keys if key in ROWS]
        assert shown, rule.keys
        assert set(rule.values) <= set(ROWS[shown[0]])


@pytest.mark.parametrize("chinese", [False, True])
def test_the_table_says_what_is_refused_and_why(chinese: bool) -> None:
    text = combinations(chinese)
    refused, taken = ("拒绝", "可以") if chinese else ("refused", "yes")
    rows = {cells[0].strip("` "): cells[1:] for line in text.splitlines() if (cells := line.strip("| ").split(" | "))}
    assert rows["parallel.offload` weights"] == [refused] * 4 + [taken] * 2 + [refused]
    assert rows["quant.experts` int8, fp8"] == [taken] * 4 + [refused] * 3
    assert rows["train.optimizer` adamw, sgd"] == [taken] * 7
    for rule in RULES:
        assert (twins()[rule.why] if chinese else rule.why) in text
