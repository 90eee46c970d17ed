"""The calls of the published scripts and of evaluation kits: their inputs, and their answers, are our own path's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from cogtune import CogVLM2ForCausalLM, CogVLM2Processor
from cogtune.errors import DataError, InputError

PICTURE = Image.radial_gradient("L").resize((20, 13)).convert("RGB")
HISTORY = [("What is it?", "A red bus."), ("How many?", "One.")]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> CogVLM2ForCausalLM:
    return CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> CogVLM2Processor:
    return CogVLM2Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("history", [None, [], HISTORY])
@pytest.mark.parametrize("picture", [PICTURE, None])
@pytest.mark.parametrize("template", [None, "vqa"])
@pytest.mark.parametrize("answer", [None, "Two."])
def test_the_inputs_are_the_processors(model, processor, tokenizer, history, picture, template, answer):
    images = None if picture is None else [picture]
    found = model.build_conversation_input_ids(
        tokenizer, query="And now?", history=history, images=images, template_version=template, answer=answer
    )
    wanted = processor(picture, "And now?", history=history, answer=answer, template=template)
    assert list(found) == ["input_ids", "token_type_ids", "attention_mask", "images", "labels"]
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(found[name], wanted[name][0])
    assert (found["labels"] is None) == (answer is None)
    assert answer is None or torch.equal(found["labels"], wanted["labels"][0])
    assert (found["images"] is None) == (picture is None)
    assert picture is None or torch.equal(found["images"][0], wanted["pixel_values"][0])
    assert tokenizer.pad_token_id == model.config.pad_token_id  # as the published code leaves it


def evaluation_kit(model, tokenizer, prompt: str, image: Image.Image, **settings) -> str:
    """VLMEvalKit's wrapper, call by call."""
    inputs = model.build_conversation_input_ids(tokenizer, query=prompt, history=[], images=[image])
    inputs = {
        "input_ids": inputs["input_ids"].unsqueeze(0).to(model.device),
        "token_type_ids": inputs["token_type_ids"].unsqueeze(0).to(model.device),
        "attention_mask": inputs["attention_mask"].unsqueeze(0).to(model.device),
        "images": [[inputs["images"][0].to(model.device).to(model.dtype)]],
    }
    with torch.no_grad():
        outputs = model.generate(**inputs, **settings)
        outputs = outputs[:, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(outputs[0]).split("<|end_of_text|>")[0]


def test_an_evaluation_kits_answer_is_our_own(model, processor, tokenizer):
    ours = processor(PICTURE, "How many?")
    ids = model.generate(**ours, max_new_tokens=12, do_sample=False)[0, ours["input_ids"].shape[1] :]
    pad = model.config.pad_token_id
    kit = evaluation_kit(model, tokenizer, "How many?", PICTURE, max_new_tokens=12, do_sample=False, pad_token_id=pad)
    assert kit == tokenizer.decode(ids).split("<|end_of_text|>")[0]
    assert kit != evaluation_kit(model, tokenizer, "How many?", PICTURE.rotate(90), max_new_tokens=12, do_sample=False)


def test_the_published_training_batch_has_our_loss(model, processor, tokenizer):
    """Padded on the right, with one list of pictures for each row."""
    asked = [("What?", "A bus.", PICTURE), ("And what is this one?", "Two.", PICTURE.rotate(90))]
    rows = [
        model.build_conversation_input_ids(tokenizer, query=query, history=None, images=[image], answer=answer)
        for query, answer, image in asked
    ]
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 258, "token_type_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.stack(
            [torch.cat([row[name], row[name].new_full((width - len(row[name]),), value)]) for row in rows]
        )
        for name, value in fill.items()
    }
    ours = processor.pad_left([processor(image, query, answer=answer) for query, answer, image in asked])
    found = model(**batch, images=[row["images"] for row in rows]).loss
    torch.testing.assert_close(found, model(**ours).loss)


def test_pictures_of_other_forms_are_refused(model, processor, tokenizer):
    row = processor(PICTURE, "What?")
    ids, types, pixels = row["input_ids"], row["token_type_ids"], row["pixel_values"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="the pictures of 2 rows; input_ids has 1"):
            call(input_ids=ids, token_type_ids=types, images=[[pixels[0]], [pixels[0]]])
        with pytest.raises(ValueError, match=r"images is a list with a list of pictures for each row"):
            call(input_ids=ids, token_type_ids=types, images=[pixels[0]])
        with pytest.raises(ValueError, match="two forms of the same pictures"):
            call(input_ids=ids, token_type_ids=types, images=[[pixels[0]]], pixel_values=pixels)
        with pytest.raises(ValueError, match="1 images need"):
            call(input_ids=ids, token_type_ids=types * 0, images=[[pixels[0]]])
    with pytest.raises(InputError, match="2 pictures given"):
        model.build_conversation_input_ids(tokenizer, query="q", images=[PICTURE, PICTURE])
    with pytest.raises(DataError, match=r"https://example.org/a.jpg: addresses of pictures are not fetched") as caught:
        model.build_conversation_input_ids(tokenizer, query="q", images=["https://example.org/a.jpg"])
    assert caught.value.code == "image-url"
