"""The page is one file with everything in it, and says what the record says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.demo.chart import Line, loss_chart
from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.examples import ShownPicture
from cogtune.demo.page import render

METRICS = [{"kind": "train", "step": step, "loss": 4.0 / step} for step in (1, 2, 5, 10, 20)]
METRICS.append({"kind": "validation", "step": 20, "loss": 0.3})


def scores(right: int) -> dict[str, Any]:
    kinds = {"yes or no": {"right": right, "total": 8, "accuracy": right / 8}}
    return {"accuracy": right / 8, "right": right, "total": 8, "by_kind": kinds}


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "data": {"train": {"pictures": 4000, "questions": 38575}, "test": {"pictures": 1000, "questions": 9673}},
        "scores": {"always “no”": scores(4), "base": scores(1), "tuned": scores(7), "blind": scores(5)},
        "merged_answers": [{"picture": "00007", "question": "is it <b>?", "answer": "yes", "reference": "no"}],
        "times": {"fine-tuning": {"seconds": 61.4, "cpu_seconds": 110.0}},
        "total_seconds": 123.4,
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2},
        "versions": {"python": "3.11", "torch": "2", "transformers": "5", "peft": "0"},
    }


@pytest.fixture
def example() -> ShownPicture:
    picture = VqaPicture("00007", Path("none.png"), (("what <shape>?", "circle"),))
    answers = {"base": ["a small <red> circle"], "tuned": ["square"]}
    return ShownPicture(picture, Image.new("RGB", (8, 8), "red"), [("what <shape>?", "circle")], answers)


def test_it_needs_nothing_from_elsewhere(record: dict[str, Any], example: ShownPicture) -> None:
    text = render(record, [example], METRICS)
    assert not re.search(r"(?:src|href|url\(|@import)[=\s\"'(]*(?!data:)[\w./:]*(?:https?:|//)", text)
    assert [found[:22] for found in re.findall(r'src="([^"]*)', text)] == ["data:image/png;base64,"]
    assert "<script" not in text
    assert "<link" not in text


def test_it_shows_accuracies_answers_and_times(record: dict[str, Any], example: ShownPicture) -> None:
    text = render(record, [example], METRICS)
    for shown in ("12.50 %", "87.50 %", "62.50 %", "50.00 %", "38,575", "61.4 s", "123.4 s", "picture 00007"):
        assert shown in text
    assert "what &lt;shape&gt;?" in text
    assert "a small &lt;red&gt; circle" in text
    assert "(right: circle)" in text
    assert text.index("no picture, no model") < text.index("tiny base, untuned") < text.index("tuned, every picture")


def test_its_tags_close(record: dict[str, Any], example: ShownPicture) -> None:
    class Checker(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "img"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass  # <line .../> closes itself

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(render(record, [example], METRICS))
    assert checker.open == []


def test_the_chart_draws_every_point_inside_its_frame() -> None:
    points = [(1.0, 4.0), (50.0, 0.02), (100.0, 0.0)]
    svg = loss_chart([Line("training", "training", points), Line("none", "none", [])])
    drawn = re.search(r'points="([^"]*)"', svg)
    assert drawn
    spots = [tuple(map(float, spot.split(","))) for spot in drawn[1].split()]
    assert len(spots) == 3
    assert all(0 <= x <= 720 and 0 <= y <= 260 for x, y in spots)
    assert [x for x, _ in spots] == sorted(x for x, _ in spots)
    assert spots[0][1] < spots[1][1]
