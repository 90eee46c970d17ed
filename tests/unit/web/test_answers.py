"""What the page asks of the models, without the page."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cogtune.checkpoint.load import load_model
from cogtune.errors import InputError, RunError
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.processing.processor import CogVLM2Processor
from cogtune.web.answers import Turn, closed_questions, history_of, score, stream
from tests.support.answering import FakeGenerator


def _stream(
    sides: dict[str, Any], question: str = "q", turns: Sequence[Turn] = (), **more: Any
) -> list[dict[str, str]]:
    given = {"decoding": Decoding(8), "seed": 1, "stopped": threading.Event(), "seconds": 30.0} | more
    return list(stream(sides, None, turns, question, **given))


def test_both_sides_answer_with_histories_of_their_own(tiny_checkpoint: Path) -> None:
    sides = {"base": FakeGenerator(tiny_checkpoint, lambda ask: f"base {len(ask[2])}"),
             "tuned": FakeGenerator(tiny_checkpoint, lambda ask: f"tuned after {[a for _, a in ask[2]]}")}  # fmt: skip
    turns = [Turn("one?", {"base": "b1", "tuned": "t1"}), Turn("two?", {"base": "b2"})]
    assert _stream(sides, turns=turns)[-1] == {"base": "base 2", "tuned": "tuned after ['t1', 'b2']"}
    assert history_of([Turn("nothing?", {"base": ""})], "base") == []


def test_it_is_streamed_and_stopped(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(load_model(tiny_checkpoint), CogVLM2Processor.from_pretrained(tiny_checkpoint))
    monkeypatch.setattr(generator.engine, "ends", frozenset())
    whole = _stream({"one": generator, "two": generator}, decoding=Decoding(40))
    assert len(whole) > 2
    assert whole[-1]["one"] == whole[-1]["two"] == generator.answer(None, "q", decoding=Decoding(40))
    stopped = threading.Event()
    texts = []
    for text in stream({"one": generator}, None, (), "q", Decoding(3000), 1, stopped, 60):
        texts.append(text["one"])
        stopped.set()
    assert 0 < len(texts[-1]) < 2000
    with pytest.raises(RunError, match=r"within 0\.05 seconds"):
        _stream({"one": generator}, decoding=Decoding(3000), seconds=0.05)
    deadline = time.monotonic() + 5
    while generator.engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not generator.engine.running
    generator.close()


def test_what_cannot_be_asked_is_said(tiny_checkpoint: Path) -> None:
    def fail(_: Any) -> str:
        raise InputError("too long")

    with pytest.raises(InputError, match="the question is empty"):
        _stream({"one": FakeGenerator(tiny_checkpoint)}, question=" \n")
    with pytest.raises(InputError, match="too long"):
        _stream({"one": FakeGenerator(tiny_checkpoint, fail)})


def test_closed_questions_are_lines_and_choices(tiny_checkpoint: Path) -> None:
    found = closed_questions("Red?\n\n Big? \n", "yes， no,yes")
    assert [(one.query, one.choices) for one in found] == [("Red?", ("yes", "no")), ("Big?", ("yes", "no"))]
    generator = Generator(load_model(tiny_checkpoint), CogVLM2Processor.from_pretrained(tiny_checkpoint))
    scores = score({"one": generator}, None, found)["one"]
    assert [sum(one.probabilities) for one in scores] == pytest.approx([1, 1])
    for questions, choices, words in ((" \n", "yes,no", "no question"), ("Red?", "yes, yes", "two different")):
        with pytest.raises(InputError, match=words):
            closed_questions(questions, choices)
    generator.close()
