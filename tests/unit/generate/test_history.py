"""Oldest turns make room; a question alone that is too long is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogtune.checkpoint.random import tiny_config
from cogtune.errors import DataError
from cogtune.generate.history import fit_history, prompt_limit
from cogtune.processing.encode import Encoder
from cogtune.processing.processor import CogVLM2Processor


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return CogVLM2Processor.from_pretrained(tiny_checkpoint).encoder


def test_the_newest_turns_that_fit_stay(encoder: Encoder) -> None:
    history = [(f"q{n}", f"a{n}") for n in range(5)]
    for wanted in range(6):
        limit = len(encoder.prompt_ids("q", history[5 - wanted :]))
        assert fit_history(encoder, "q", history, limit) == (history[5 - wanted :], 5 - wanted)
        if wanted:
            assert fit_history(encoder, "q", history, limit - 1)[1] == 6 - wanted


def test_a_question_that_does_not_fit_alone(encoder: Encoder) -> None:
    length = len(encoder.prompt_ids("long question"))
    with pytest.raises(DataError, match=f"{length} tokens; {length - 1} fit"):
        fit_history(encoder, "long question", [("a", "b")], length - 1)


def test_the_limit_leaves_room_for_picture_and_answer() -> None:
    config = tiny_config(max_position_embeddings=100)  # an image takes 6 tokens
    assert prompt_limit(config, head=7, max_new_tokens=40) == 53
    assert prompt_limit(config, head=1, max_new_tokens=40) == 59
    assert prompt_limit(config, head=1, max_new_tokens=40, max_input_len=30) == 30
    assert prompt_limit(config, head=1, max_new_tokens=5000) == 49
