"""Rows that share a card keep their peaks and lose what the others would spoil."""

from __future__ import annotations

import pytest

from cogtune.bench import card_memory
from cogtune.bench.report import Results
from cogtune.errors import ConfigError


def test_rows_that_ran_together_say_so_and_give_no_times(monkeypatch, tmp_path):
    measured = {"peak_reserved_gib": 1.0, "wall_s": 2.0, "median_ms": 3.0, "driver_gib": 4.0, "load_s": 5.0}
    monkeypatch.setattr(card_memory, "_run", lambda name, row, words: {"name": name, **measured})
    results = Results("fit", "test", tmp_path / "fit.json")
    card_memory.run_rows(["fill", "bf16-cached-r8+inference-nf4"], results, model="somewhere")
    rows = {row["name"]: row for row in results.rows}
    assert rows["fill"]["median_ms"] == 3.0
    for name in ("bf16-cached-r8", "inference-nf4"):
        assert rows[name]["peak_reserved_gib"] == 1.0
        assert rows[name]["together"] == ["bf16-cached-r8", "inference-nf4"]
        assert not {"median_ms", "driver_gib", "load_s"} & rows[name].keys()


def test_an_unknown_row_in_a_group_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no row `nothing`"):
        card_memory.run_rows(["fill+nothing"], Results("fit", "test", None), model="somewhere")
