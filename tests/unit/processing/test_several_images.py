"""Sequences and trees with none, one, two and 24 images, held to token lists that are written out by hand."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from cogtune import CogVLM2Processor
from cogtune.errors import InputError
from cogtune.model.routing import row_positions
from cogtune.processing.encode import Encoded, Encoder
from cogtune.processing.image import preprocess
from cogtune.processing.tree import build_tree
from tests.support.tokenizers import llama3_tokenizer_json, tiny_tokenizer
from tests.unit.processing.test_tree import CHAT, JOINTS, check, turns

COUNTS = (0, 1, 2, 24)
BOS, EOS, IMAGE, EACH = 256, 257, 258, 6
# Merges that would show up if a number were not tokenised on its own: with the text behind it, or with the next digit.
NUMBER_JOINTS = ((b"0", b"Q"), (b"1", b"Q"), (b"3", b"Q"), (b"1", b"2"))


def encoder_of(images: int = 24, *, numbered: bool, joints: tuple[tuple[bytes, bytes], ...] = NUMBER_JOINTS) -> Encoder:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer(384, joints))
    ids = {"num_image_tokens": EACH, "bos_id": BOS, "eos_id": EOS, "image_id": IMAGE}
    return Encoder(tokenizer, **ids, template="chat", max_images=images, numbered_images=numbered)


def written_out(images: int, numbered: bool, text: bytes, answer: bytes, twelve: int) -> Encoded:
    """One sequence, token by token; ``twelve``: the one token of ``12``."""
    ids, types = [BOS], [0]
    for number in range(images):
        for _ in range(EACH):
            ids.append(IMAGE)
            types.append(1)
        if numbered:
            digits = [twelve] if number == 12 else list(str(number).encode())
            ids.extend(digits)
            types.extend(0 for _ in digits)
    ids.extend(text)
    types.extend(0 for _ in text)
    before = len(ids)
    labels = [-100] * before + [*answer, EOS]
    ids.extend([*answer, EOS])
    types.extend([0] * (len(answer) + 1))
    return Encoded(ids, types, labels, before)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("images", COUNTS)
def test_images_stand_first_and_only_the_chat_template_numbers_them(images: int, numbered: bool) -> None:
    encoder = encoder_of(numbered=numbered)
    twelve = encoder.tokenizer.encode("12", add_special_tokens=False)
    assert len(twelve) == 1
    text = b"Question: a Answer: b\nQuestion: c Answer:"
    found = encoder.encode("c", [("a", "b")], "ok", images)
    assert found == written_out(images, numbered, text, b"ok", *twelve)
    assert encoder.head_tokens(images) == found.prompt_len - len(text)
    for template, asked in (("vqa", b"Question: c Short answer:"), ("base", b"c")):
        assert encoder.encode("c", (), "ok", images, template) == written_out(images, False, asked, b"ok", *twelve)
        assert encoder.head_tokens(images, template) == 1 + images * EACH


def test_parts_stand_in_the_order_given() -> None:
    encoder = encoder_of(numbered=False)
    found = encoder.assemble([[1, 2], "image", "image", [3], "image"], [4])
    assert found.input_ids == [BOS, 1, 2, *[IMAGE] * 12, 3, *[IMAGE] * 6, 4, EOS]
    assert found.token_type_ids == [0, 0, 0, *[1] * 12, 0, *[1] * 6, 0, 0]
    assert found.labels == [-100] * 22 + [4, EOS]


def test_more_images_than_the_model_takes_are_refused() -> None:
    with pytest.raises(InputError, match="2 pictures given; CogVLM2 takes one"):
        encoder_of(1, numbered=False).encode("q", images=2)
    with pytest.raises(InputError, match="25 pictures given; CogVLM2 takes at most 24"):
        encoder_of(24, numbered=True).head_tokens(25)


@pytest.mark.parametrize(
    ("template", "images", "query", "answer", "length", "last_position"),
    [
        ("chat", 24, "Please describe this video in detail.", None, 1620, 107),
        ("chat", 7, "Please describe this video in detail.", "A dog runs.", 486, 44),
        ("base", 24, "Describe the video: ", None, 1590, 8),
        ("vqa", 3, "Which animal?", "dog", 209, 13),
        ("base", 3, "Please describe this video in detail.", None, 206, 10),
    ],
)
def test_lengths_and_positions_of_the_published_video_prompts(
    template: str, images: int, query: str, answer: str | None, length: int, last_position: int
) -> None:
    """A frame of 224 pixels takes 66 positions; its number follows it in the chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama3_tokenizer_json())
    ids = {"num_image_tokens": 66, "bos_id": 128000, "eos_id": 128001, "image_id": 128002}
    encoder = Encoder(tokenizer, **ids, template=template, max_images=24, numbered_images=True)
    found = encoder.encode(query, (), answer, images)
    assert len(found) == length
    assert sum(found.token_type_ids) == 66 * images
    assert row_positions(torch.tensor([found.token_type_ids]), None)[0, -1] == last_position
    if template == "chat":
        assert found.input_ids[67] == 15  # "0", as Llama-3 writes it


# ---- trees


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("images", COUNTS)
def test_samples_share_all_their_images(images: int, numbered: bool) -> None:
    encoder = encoder_of(numbered=numbered, joints=(*JOINTS, *NUMBER_JOINTS))
    samples = turns(encoder, CHAT, images) + turns(encoder, [("0?", "Two."), ("Sure?", "aa")], images)
    samples += turns(encoder, CHAT, 0)[:1]
    random.Random(images).shuffle(samples)
    row = build_tree(samples)
    check(row, samples)
    assert row.token_type_ids.count(1) == images * EACH
    head = encoder.assemble(encoder.image_parts(images)).input_ids[1:]
    segments = [segment for segment, kind in zip(row.segment_ids, row.token_type_ids, strict=True) if kind]
    if images:
        first = row.segment_ids.index(segments[0])
        assert row.input_ids[first : first + len(head)] == head  # every image once, with the texts between them
        assert {row.segment_ids[at] for at in range(first, first + len(head))} == {segments[0]}


def test_samples_with_other_images_are_refused() -> None:
    """Otherwise the shared part would end inside the images, and one of them would be in the row twice."""
    plain, numbered = encoder_of(numbered=False), encoder_of(numbered=True)
    for samples in (
        [plain.encode("q", images=1), plain.encode("q", images=2)],
        [numbered.encode("q", images=2), numbered.encode("q", images=24), numbered.encode("q", images=0)],
        [plain.encode("q", images=2), numbered.encode("q", images=2)],
    ):
        with pytest.raises(ValueError, match="the same pictures in the same order"):
            build_tree(samples)


# ---- the processor


def test_several_pictures_in_order(processor: CogVLM2Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.encoder, "max_images", 24)
    pictures = [Image.radial_gradient("L").resize((9 + n, 8)).convert("RGB") for n in range(24)]
    for count in COUNTS:
        inputs = processor(images=pictures[:count], query="Why?", answer="So.")
        assert inputs["token_type_ids"].sum() == EACH * count
        assert ("pixel_values" in inputs) == (count > 0)
        if count:
            assert torch.equal(inputs["pixel_values"], torch.stack([preprocess(p, 8) for p in pictures[:count]]))
    rows = [
        processor(images=pictures[:2], query="one"),
        processor(query="two"),
        processor(image=pictures[2], query="3"),
    ]
    batch = processor.pad_left(rows)
    assert torch.equal(batch["pixel_values"], processor.pixels(pictures[:3]))


def test_a_model_of_one_picture_takes_a_sequence_of_at_most_one(processor: CogVLM2Processor) -> None:
    picture = Image.new("RGB", (8, 8))
    one = processor(images=[picture], query="q")
    assert torch.equal(one["pixel_values"], processor(image=picture, query="q")["pixel_values"])
    assert "pixel_values" not in processor(images=(), query="q")
    with pytest.raises(InputError, match="2 pictures given; CogVLM2 takes one"):
        processor(images=[picture, picture], query="q")
    with pytest.raises(InputError, match="2 pictures given; CogVLM2 takes one"):
        processor.pixels([picture, picture])
    with pytest.raises(InputError, match="both image and images"):
        processor(image=picture, images=[picture], query="q")
