"""The tool that fits the allocator's numbers finds those that made the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import refit
from cogtune.plan.calibration import Allocator
from cogtune.plan.memory import predict
from cogtune.system.byte_sizes import GIB, MIB


def result(folder: Path) -> Path:
    """A sweep's file, its figures to be filled in."""
    rows = []
    for batch, text in ((1, 100), (1, 1000), (4, 400), (8, 1000)):
        rows.append({
            "name": f"batch-{batch}-text-{text}", "preset": f"text={text}", "features": "cached", "ranks": 1,
            "changes": {"preset": f"text={text}", "train.batch_size": str(batch), "features": "cached",
                        "train.gradient_checkpointing": "all"},
            "batch_size": batch, "tokens": batch * (2307 + text), "labels": batch * text // 2,
            "allocated_gib": 1.0, "reserved_gib": 1.0,
        })  # fmt: skip
    rows.append({"name": "broken", "error": "out of memory"})
    command = "cogtune bench sweep memory --model BASE --quant.experts nf4 --train.compile false --steps 1"
    file = folder / "sweep.json"
    file.write_text(json.dumps({"command": command, "card": "NVIDIA H100 80GB HBM3", "rows": rows}), encoding="utf-8")
    return file


def test_the_numbers_behind_the_rows_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, true = result(tmp_path), Allocator(share=0.03, working=0.3, update=0.0, fixed=80 * MIB, per_layer=0)
    rows = list(refit.read(file, expandable=True))
    assert [row.setting.quant.experts for row in rows] == ["nf4"] * 4
    assert [row.setting.batch.rows for row in rows] == [1, 1, 4, 8]
    assert all(len(row.setting.decoder) == 32 and row.setting.tower == "cached" for row in rows)
    record = json.loads(file.read_text(encoding="utf-8"))
    for row, kept in zip(rows, record["rows"], strict=False):
        held, again, *_ = row.causes
        allocated = predict(row.setting).phase("train").allocated
        kept["allocated_gib"] = allocated / GIB
        kept["reserved_gib"] = (allocated + true.slack(round(held * GIB), round(again * GIB))) / GIB
    file.write_text(json.dumps(record), encoding="utf-8")
    found = refit.main([str(file)])
    assert found["share"] == pytest.approx(true.share, abs=1e-3)
    assert found["working"] == pytest.approx(true.working, abs=1e-2)
    assert found["fixed"] * GIB / MIB == pytest.approx(80, abs=2)
    said = capsys.readouterr().out
    assert "batch-8-text-1000" in said
    assert "EXPANDABLE = Allocator(share=0.030" in said
