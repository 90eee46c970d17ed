"""A short version of the fault campaign: kills at random moments, and one trial of every other fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def campaign(folder: Path, *words: str) -> dict[str, Any]:
    """Its own process, because its runs are forked from one that has computed nothing."""
    result = folder / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--work", str(folder), "--output", str(result), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.read_text())
    assert found["failures"] == []
    return found


def test_a_few_kills(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills", "2", "--others", "0", "--seed", "7")
    assert found["kills"] == 2
    assert found["steps done again, most"] <= found["save_steps"]


@pytest.mark.campaign
def test_every_other_fault_once(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills", "0", "--others", "1")
    assert all(kind["trials"] == 1 and kind["failed"] == 0 for kind in found["other faults"].values())
