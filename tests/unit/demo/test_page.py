"""The demo's page is the report of its training and test questions, with its baselines and its merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.page import demo_report
from cogtune.demo.score import score
from cogtune.evaluate.report.page import render
from cogtune.evaluate.run_folder import RunFolder


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "merged_answers": [{"picture": "00007", "question": "is it <b>?", "answer": "yes", "reference": "no"}],
        "times": {"fine-tuning": {"seconds": 61.4, "cpu_seconds": 110.0}},
        "total_seconds": 123.4,
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2},
        "versions": {"python": "3.11", "torch": "2", "transformers": "5", "peft": "0"},
    }


def test_it_shows_scores_baselines_answers_and_times(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "00007.png")
    file = tmp_path / "images" / "00007.png"
    pictures = [VqaPicture("00007", file, (("what <shape>?", "circle"), ("is there red?", "yes")))]
    scores = {"always “no”": ["no", "no"], "base": ["a small <red> circle", "yes"], "tuned": ["circle", "yes"],
              "blind": ["square", "yes"]}  # fmt: skip
    measured = {name: score(answers, pictures) for name, answers in scores.items()}
    text = render(demo_report(RunFolder(tmp_path), tmp_path, pictures, measured, record))
    for shown in ("100.0", "50.0", "always “no”: 0.0 % right", "总是回答“no”：0.0 % 正确",
                  "what &lt;shape&gt;?", "a small &lt;red&gt; circle",
                  "is it &lt;b&gt;?", "(right: no)", "picture 00007", "A CPU, 2 cores"):  # fmt: skip
        assert shown in text
    assert text.count("data:image/webp;base64,") == 1
