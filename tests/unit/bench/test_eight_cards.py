"""What the script for many cards makes of its rows; the launches themselves are `cogtune bench train`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eight_cards


def _row(name: str, rate: float, losses: list[float]) -> dict[str, Any]:
    return {"name": name, "samples_per_second": rate, "losses": losses}


def test_scaling_and_agreement() -> None:
    rows = [_row("single", 5.0, [1.0]), _row("ddp", 39.0, [12.0, 11.5]), _row("fsdp2", 30.0, [12.0, 11.51])]
    found = eight_cards.compare([*rows, {"name": "zero3", "error": "x"}])
    assert found["scaling"] == {"ddp": 7.8, "fsdp2": 6.0}
    assert found["losses"]["compared"] == ["ddp", "fsdp2"]
    assert found["losses"]["largest_difference"] == pytest.approx(0.01)
    assert found["losses"]["agree"] is True
    assert eight_cards.compare([*rows, _row("zero3", 1.0, [12.0, 11.6])])["losses"]["agree"] is False


def test_called_again_it_runs_only_what_lacks_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, cards: int, model: str, small: bool) -> dict[str, Any]:
        ran.append(name)
        failed = {"error": "no room"} if ran.count(name) == 1 and name == "zero3" else {}
        return {**_row(name, 2.0, [1.0]), "median_ms": 1.0, "allocated_gib": 1.0, "wall_s": 1.0, **failed}

    monkeypatch.setattr(eight_cards, "run_row", run)
    file = tmp_path / "cards.json"
    eight_cards.main([str(file), "--only", "single", "zero3"])
    eight_cards.main([str(file), "--only", "single", "zero3", "ddp"])
    assert ran == ["single", "zero3", "zero3", "ddp"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["single", "zero3", "ddp"]
    assert not any("error" in row for row in rows)


def test_every_rows_words_are_a_configuration() -> None:
    from cogtune.bench.variants import parse_variants
    from cogtune.cli.options import split_arguments

    for name, words in eight_cards.ROWS.items():
        text = " ".join(words).replace("--features cached", "").replace("--features live", "")
        keys = text.replace("--preset 512+512", "").split()
        (variant,) = parse_variants([], split_arguments(keys).overrides, preset="s400", cached=True)
        assert variant.config.lora.dropout == 0, name
