"""The line that shows how fast answers come."""

from __future__ import annotations

import re

import pytest

from cogtune.cli.progress import ProgressLine


def test_what_comes_in_one_call_has_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine("questions", 2)(6, 6)
    found = re.search(r"6/6 questions, ([\d.]+)/s", capsys.readouterr().err)
    assert found is not None
    assert float(found[1]) > 0
