"""The generator: batches, streams, pictures seen once, and a model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogtune.errors import DataError, InputError, OutOfMemoryError
from cogtune.generate.decode_steps import DecodeSteps
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask, Generator
from cogtune.processing.processor import CogVLM2Processor
from tests.support.adapters import write_adapter
from tests.support.data_folders import write_image

SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def generator(parts: tuple[Any, CogVLM2Processor]) -> Generator:
    return Generator(*parts)


def test_a_batch_answers_as_single_questions_do(generator: Generator, asks: list[Ask]) -> None:
    single = [generator.answer_batch([ask], SHORT)[0] for ask in asks]
    assert generator.answer_batch(asks, SHORT) == single
    assert len(set(single)) == len(single)
    assert generator.answer_batch([], SHORT) == []


def test_an_answer_is_what_generate_gives_for_the_processors_inputs(generator: Generator, asks: list[Ask]) -> None:
    image, query, history = asks[2]
    inputs = generator.processor(image=image, query=query, history=history)
    ids = generator.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=[257, 259])
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert generator.answer_batch([asks[2]], SHORT) == [generator.processor.decode(new).strip()]


def test_a_stream_joins_to_the_batch_answer(generator: Generator, asks: list[Ask]) -> None:
    for ask, whole in zip(asks, generator.answer_batch(asks, SHORT), strict=True):
        pieces = list(generator.stream(*ask, decoding=SHORT))
        assert "".join(pieces) == whole
        assert all(pieces)


@pytest.mark.parametrize("end", [257, 259])
def test_both_end_tokens_end_an_answer(
    end: int, generator: Generator, red: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generator.model.generate(
        **generator.processor(image=red, query="What colour?"), max_new_tokens=1, do_sample=False
    )[0, -1]
    weight = generator.model.lm_head.weight
    swapped = weight.detach().clone()
    swapped[[end, int(first)]] = swapped[[int(first), end]]  # the first token of the answer is now an end token
    monkeypatch.setattr(weight, "data", swapped)
    assert generator.answer_batch([(red, "What colour?", [])], SHORT) == [""]
    assert list(generator.stream(red, "What colour?", decoding=SHORT)) == []


def test_the_tower_sees_an_image_once(generator: Generator, red: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever object it comes as, and whatever is asked in between."""
    seen: list[int] = []
    real = generator.model.model.encode_images

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(generator.model.model, "encode_images", counting)
    first, other = Image.new("RGB", (9, 9), (1, 2, 3)), Image.new("RGB", (9, 9), (3, 2, 1))
    generator.answer_batch([(first, "one", []), (first, "two", []), (other, "three", [])], SHORT)
    generator.answer_batch([(other.copy(), "four", []), (None, "five", []), (first, "six", [])], SHORT)
    list(generator.stream(first.copy(), "seven", decoding=SHORT))
    assert sum(seen) == 2


def test_questions_about_several_images(
    generator: Generator, red: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model of video frames is asked: none, one, two and 24 images in one batch, each image seen once."""
    with pytest.raises(InputError, match="2 pictures given; CogVLM2 takes one"):
        generator.answer_batch([([red, red], "Which?", [])], SHORT)
    monkeypatch.setattr(generator.processor.encoder, "max_images", 24)
    monkeypatch.setattr(generator.processor.encoder, "numbered_images", True)
    many = [Image.new("RGB", (8, 8), (n * 10, 250 - n * 9, n * 5)) for n in range(24)]
    asks: list[Ask] = [([red, many[0]], "Which?", []), (None, "Hello?", []), (many, "What?", []), ((red,), "Why?", [])]
    wanted = []
    for images, query, _ in asks:
        inputs = generator.processor(images=images, query=query)
        ids = generator.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=[257, 259])
        wanted.append(generator.processor.decode(ids[0, inputs["input_ids"].shape[1] :]).strip())
    seen: list[int] = []
    real = generator.model.model.encode_images
    monkeypatch.setattr(generator.model.model, "encode_images", lambda pixels: seen.append(len(pixels)) or real(pixels))
    asked = Generator(generator.model, generator.processor)
    assert asked.answer_batch(asks, SHORT) == wanted
    assert sum(seen) == 25
    assert "".join(asked.stream(*asks[0], decoding=SHORT)) == wanted[0]
    assert sum(seen) == 25


def test_sampling_follows_the_seed_and_differs_from_greedy(generator: Generator, asks: list[Ask]) -> None:
    sampled = Decoding(12, sample=True, temperature=1.5, top_p=0.95, top_k=0)
    torch.manual_seed(3)
    one = generator.answer_batch(asks, sampled)
    torch.manual_seed(3)
    assert generator.answer_batch(asks, sampled) == one
    assert one != generator.answer_batch(asks, SHORT)


def test_an_adapter_changes_the_answers(
    generator: Generator, asks: list[Ask], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from cogtune.generate.loading import load_generator

    folder = write_adapter(tiny_checkpoint, tmp_path / "run" / "adapter", size=0.3)
    adapted = load_generator(adapter=folder.parent)
    assert adapted.answer_batch(asks, SHORT) != generator.answer_batch(asks, SHORT)


def test_out_of_memory_says_what_to_try(generator: Generator, asks: list[Ask], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(DecodeSteps, "step", fail)
        with pytest.raises(OutOfMemoryError, match="out of memory while answering") as caught:
            generator.answer_batch(asks, SHORT)
        assert "--quant.experts nf4" in str(caught.value.hint)
    assert generator.answer_batch(asks[:1], SHORT)


def test_questions_about_files_are_those_about_their_pictures(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the tower runs for a file that has changed."""
    file = write_image(tmp_path / "picture.png", (10, 200, 30))
    picture = Image.open(file).convert("RGB")
    expected = generator.answer_batch([(picture, "what?", ()), (None, "why?", ())], SHORT)
    runs: list[int] = []
    real = generator.model.model.encode_images
    monkeypatch.setattr(generator.model.model, "encode_images", lambda pixels: runs.append(len(pixels)) or real(pixels))
    assert generator.answer_batch([(file, "what?"), (None, "why?")], SHORT) == expected
    assert generator.answer(str(file), "what?", decoding=SHORT) == expected[0]
    assert "".join(generator.stream([file], "what?", decoding=SHORT)) == expected[0]
    assert runs == []  # it is the picture that was asked about
    write_image(file, (200, 10, 10), size=(30, 20))
    assert generator.answer(file, "what?", decoding=SHORT) != expected[0]
    assert runs == [1]
    with pytest.raises(DataError, match="no such picture"):
        generator.answer(tmp_path / "no.png", "what?")


def test_a_call_without_decoding_follows_the_generators(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "decoding", Decoding(3))
    long = generator.answer(None, "why?", decoding=Decoding(20))
    assert generator.answer(None, "why?") == generator.answer(None, "why?", decoding=Decoding(3)) != long
