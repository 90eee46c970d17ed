"""Batches through ``generate()``: the same answers as the engine's, pictures seen once, and a model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from cogtune.errors import OutOfMemoryError, SetupError
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask, Generator
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.processing.processor import CogVLM2Processor

SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def generator(parts: tuple[Any, CogVLM2Processor]) -> TransformersGenerator:
    return TransformersGenerator(*parts, slots=3)


def test_answers_are_the_engines(generator: TransformersGenerator, asks: list[Ask]) -> None:
    """In a batch, as streams, and as questions that join batches."""
    wanted = Generator(generator.model, generator.processor).answer_batch(asks, SHORT)
    assert generator.answer_batch(asks, SHORT) == wanted
    assert ["".join(generator.stream(*ask, decoding=SHORT)) for ask in asks] == wanted
    running = [generator.submit(ask, SHORT) for ask in asks]
    assert running[3].text() == wanted[3]
    assert [answer.done for answer in running] == [False, False, False, True]
    assert [answer.text() for answer in running[:3]] == wanted[:3]
    assert generator.answer_batch([], SHORT) == []


def test_closed_questions_need_one_device(generator: TransformersGenerator) -> None:
    with pytest.raises(SetupError, match="one device"):
        generator.score(None, [])


def test_the_tower_sees_a_picture_once_while_questions_about_it_follow_each_other(
    generator: TransformersGenerator, red: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = generator.model.model.encode_images

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(generator.model.model, "encode_images", counting)
    first, other = red.copy(), red.copy()
    generator.answer_batch([(first, "one", []), (first, "two", []), (other, "three", [])], SHORT)
    generator.answer_batch([(other, "four", []), (None, "five", [])], SHORT)
    list(generator.stream(other, "six", decoding=SHORT))
    assert seen == [2]


def test_the_model_is_left_as_it_was(generator: TransformersGenerator, asks: list[Ask]) -> None:
    before = generator.model.generation_config
    generator.model.train()
    try:
        generator.answer_batch(asks[:1], SHORT)
        assert generator.model.training
    finally:
        generator.model.eval()
    assert generator.model.generation_config is before
    assert before.max_length == 4096


def test_out_of_memory_says_what_to_try(
    generator: TransformersGenerator, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**kwargs: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator.model, "generate", fail)
    with pytest.raises(OutOfMemoryError, match="4 questions at once") as caught:
        generator.answer_batch(asks, SHORT)
    assert caught.value.hint is not None
    assert "--batch-size 2" in caught.value.hint
    with pytest.raises(OutOfMemoryError, match="1 question at once"):
        list(generator.stream(*asks[0], decoding=SHORT))
