"""With the real Llama-3 vocabulary; skipped, with the reason, where it is not installed."""

from __future__ import annotations

import json
import logging
import random
import shutil

import pytest
import torch
from PIL import Image

from cogtune import CogVLM2Processor
from cogtune.model.routing import row_positions
from cogtune.processing.tokenizer import LLAMA3_SPLIT
from cogtune.processing.tree import build_tree
from tests.support.golden import family
from tests.support.tokenizers import llama3_ranks, llama3_special_tokens, llama3_tokenizer_json
from tests.unit.processing.test_tree import check

PUBLISHED = {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": [128001, 128009], "pad_token_id": 128002}
FULL_SIZE = {"image_size": 1344, "patch_size": 14, "num_positions": 9217}


@pytest.fixture(scope="module")
def loading(tmp_path_factory) -> tuple[CogVLM2Processor, list[str]]:
    """A processor on the published configuration and tokenizer, and what was logged on the way."""
    folder = tmp_path_factory.mktemp("llama3") / "base"
    shutil.copytree(llama3_tokenizer_json(), folder)
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, "vision_config": FULL_SIZE}))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        return CogVLM2Processor.from_pretrained(folder), messages
    finally:
        logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(scope="module")
def processor(loading) -> CogVLM2Processor:
    return loading[0]


QUESTION = [14924, 25, 3639, 374, 304, 279, 2217, 30, 22559, 25]
ANSWER = [32, 2579, 5951, 13]


def test_worked_example(processor):
    inputs = processor(image=Image.new("RGB", (4, 4)), query="What is in the image?", answer="A red bus.")
    assert inputs["input_ids"].tolist() == [[128000, *[128002] * 2306, *QUESTION, *ANSWER, 128001]]
    assert inputs["labels"].tolist() == [[-100] * 2317 + [*ANSWER, 128001]]
    assert inputs["token_type_ids"].tolist() == [[0, *[1] * 2306, *[0] * 15]]
    assert inputs["input_ids"].shape == (1, 2322)
    assert inputs["pixel_values"].shape == (1, 3, 1344, 1344)


def test_worked_example_second_turn_and_short_answers(processor):
    history = [("What is in the image?", "A red bus.")]
    second = [*QUESTION, 362, 2579, 5951, 627, 14924, 25, 2650, 1690, 1274, 30, 22559, 25]
    assert processor.encoder.prompt_ids("How many people?", history) == second
    short = [14924, 25, 2650, 1690, 1274, 30, 10928, 4320, 25]
    assert processor.encoder.prompt_ids("How many people?", (), "vqa") == short


def test_tree_of_turns_whose_joints_merge(processor):
    """ " A red bus." + newline: as history the full stop and the newline are one token, as a target they are not."""
    chat = [("What is in the image?", "A red bus."), ("How many people?", "Two"), ("Sure?", "Yes!\n"), ("好?", "好。")]
    samples = [processor.encode(q, chat[:at], a, images=1) for at, (q, a) in enumerate(chat)]
    row = build_tree(samples)
    check(row, samples)
    assert 627 in row.input_ids
    assert row.token_type_ids.count(1) == 2306


PIECES = [
    *(
        "The quick brown fox",
        " don't",
        "I'LL",
        "你好世界",
        "图片里有什么？",
        "日本語テキスト",
        "한국어",
        "Привет",
        "مرحبا",
    ),
    *("😀👩\u200d👩\u200d👧", "🇨🇭", "12345678", "3.14159", "1,000", "\n", "\n\n", "\t", "   ", " ", "\r\n", "_" * 9),
    *("def f(x):\n    return x**2\n", '{"a": [1, null]}', "<p>&nbsp;</p>", "https://example.org/?q=1&r=%20"),
    *("\u200b", "\u00a0", "é", "e\u0301", "ﬁ", "…", "—", "$\\frac{1}{2}$", "A", "a", "\x00", "\ufeff"),
    *("<|eot_id|>", "<|begin_of_text|>", "<|reserved_special_token_0|>", "Answer:", "Question: "),
]


def test_ids_equal_tiktokens(processor):
    tiktoken = pytest.importorskip("tiktoken")
    special = {text: id_ for id_, text in llama3_special_tokens().items()}
    reference = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=llama3_ranks(), special_tokens=special
    )
    draw = random.Random(0)
    texts = PIECES + ["".join(draw.choices(PIECES, k=draw.randint(2, 12))) for _ in range(600)]
    for text in texts:
        ids = processor.encoder.answer_ids(text)
        assert ids == reference.encode(text, allowed_special="all"), text
        assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_loads_without_a_false_alarm(loading):
    """transformers takes a large tokenizer beside a configuration without model_type for a broken Mistral one."""
    assert loading[1] == []


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> CogVLM2Processor:
    folder = tmp_path_factory.mktemp("llama3") / "video"
    shutil.copytree(llama3_tokenizer_json(), folder)
    own = PUBLISHED | {"eos_token_id": 128001, "architectures": ["CogVLMVideoForCausalLM"], "template_version": "base"}
    size = {"image_size": 224, "patch_size": 14, "num_positions": 257}
    (folder / "config.json").write_text(json.dumps({**own, "vision_config": size}))
    return CogVLM2Processor.from_pretrained(folder)


FRAMES = family()["prompts_llama3_tokenizer_image_size_224"]


@pytest.mark.parametrize("case", FRAMES["cases"], ids=lambda case: f"{case['template']}-{case['frames']}")
def test_prompts_of_the_video_model(video, case) -> None:
    template = case["template"] or "base"  # with none passed, the published code takes the configuration's
    encoded = video.encoder.encode(
        case["query"], [tuple(pair) for pair in case["history"]], case["answer"], case["frames"], template
    )
    types = encoded.token_type_ids
    assert len(encoded) == case["length"]
    assert sum(types) == case["num_vision_tokens"]
    last = max(place for place, kind in enumerate(types) if kind)
    assert encoded.input_ids[last + 1 :] == case["after_last_vision_token"]
    between = [token for token, kind in zip(encoded.input_ids[1:last], types[1:last], strict=True) if not kind]
    assert between == case["language_ids_between_frames"]
    if case["labels_tail"] is not None:
        assert encoded.labels[-len(case["labels_tail"]) :] == case["labels_tail"]
        assert sum(label != -100 for label in encoded.labels) == case["num_labels"]
    positions = row_positions(torch.tensor([types]), None)[0]
    assert positions[:3].tolist() == case["position_ids_head"]
    assert int(positions.max()) == case["last_position"]


def test_numbers_of_frames_as_tokens(video) -> None:
    for number, ids in FRAMES["time_index_ids"].items():
        assert video.encoder.tokenizer.encode(number, add_special_tokens=False) == ids
