"""What a mode of ``bench load`` reads, and that a mode that fails leaves its reason and the others their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogtune.bench import model_loading
from cogtune.bench.report import Results


def test_modes_read_what_they_need(tiny_checkpoint: Path) -> None:
    cpu = torch.device("cpu")
    whole, without, tower = (
        model_loading.measure(mode, str(tiny_checkpoint), cpu) for mode in ("bf16", "bf16-no-tower", "tower")
    )
    assert whole["read_bytes"] == without["read_bytes"] + tower["read_bytes"]
    assert tower["read_bytes"] > 0
    assert (whole["modules"], tower["modules"]) == ("CogVLM2ForCausalLM", "VisionModel")
    assert min(row["load_s"] for row in (whole, without, tower)) > 0


def test_a_failing_mode_is_a_row_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results("load", "test", tmp_path / "load.json")
    model_loading.run_modes(["bf16"], results, model=str(tmp_path / "nowhere"), device="cpu")
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert "nowhere" in row["error"]
    assert "bf16" in capsys.readouterr().out
