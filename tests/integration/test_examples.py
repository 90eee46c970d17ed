"""The examples run, shortened, from data to a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"


def run(words: list[str], **environment: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_reading_digits(tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    said = run(
        [str(EXAMPLES / "read_digits.py"), "--output", str(tmp_path), "--pictures", "40", "--epochs", "1"]
    )  # fmt: skip
    assert "points of CER" in said
    assert (tmp_path / "run" / "report.html").is_file()
    result = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in result["metrics"]] == ["cer", "exact"]


def test_the_notebook(tmp_path: Path) -> None:
    """Its code cells, one after the other, without a notebook's server."""
    cells = json.loads((EXAMPLES / "easy_vqa.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text(code, encoding="utf-8")
    said = run([str(script)], EXAMPLE_OUTPUT=str(tmp_path / "out"), EXAMPLE_PICTURES="40")
    assert "exact match" in said
    assert (tmp_path / "out" / "run" / "eval" / "report.html").is_file()
