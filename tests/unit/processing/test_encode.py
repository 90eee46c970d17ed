from __future__ import annotations

import pickle

import pytest
from transformers import PreTrainedTokenizerFast

from cogtune.errors import InputError
from cogtune.processing.encode import Encoder
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer())
    return Encoder(tokenizer, num_image_tokens=6, bos_id=256, eos_id=257, image_id=258, template="chat")


def test_question_with_picture_and_answer_token_by_token(encoder):
    encoded = encoder.encode("Why?", answer="No.")
    text, answer = list(b"Question: Why? Answer:"), list(b"No.")
    assert encoded.input_ids == [256, *[258] * 6, *text, *answer, 257]
    assert encoded.token_type_ids == [0, *[1] * 6, *[0] * (len(text) + 4)]
    assert encoded.labels == [-100] * (7 + len(text)) + [*answer, 257]
    assert encoded.prompt_len == 7 + len(text)
    assert len(encoded) == 7 + len(text) + 4


def test_text_only_uses_the_same_template_without_the_picture(encoder):
    encoded = encoder.encode("Why?", images=0)
    assert encoded.input_ids == [256, *b"Question: Why? Answer:"]
    assert set(encoded.token_type_ids) == {0}


def test_without_answer_there_is_nothing_to_learn(encoder):
    encoded = encoder.encode("Why?")
    assert set(encoded.labels) == {-100}
    assert encoded.prompt_len == len(encoded)


def test_an_empty_answer_still_learns_to_stop(encoder):
    assert encoder.encode("Why?", answer="").labels[-2:] == [-100, 257]


def test_the_picture_comes_before_all_history(encoder):
    encoded = encoder.encode("c", [("a", "b")], template="vqa")
    assert encoded.input_ids == [256, *[258] * 6, *b"Question: a Short answer: b\nQuestion: c Short answer:"]


def test_base_template_ignores_history(encoder):
    assert encoder.prompt_ids("c", [("a", "b")], "base") == list(b"c")


def test_special_tokens_written_in_text_become_their_ids_as_published(encoder):
    encoded = encoder.encode("<|reserved_special_token_0|>", answer="<|end_of_text|>!", template="base")
    assert encoded.input_ids[7:] == [258, 257, 33, 257]
    assert encoded.token_type_ids[7:] == [0, 0, 0, 0]  # the type, not the id, tells a picture's position


def test_assembled_parts_equal_the_whole(encoder):
    parts = encoder.assemble(["image", encoder.prompt_ids("q")], encoder.answer_ids("a"))
    assert parts == encoder.encode("q", answer="a")


def test_a_tokenizer_padding_of_its_own_does_not_leak_in(encoder):
    expected = encoder.encode("q")
    encoder.tokenizer.pad_token = "<|reserved_special_token_0|>"
    encoder.tokenizer(["a", "a longer text"], padding=True)
    assert encoder.encode("q") == expected


def test_travels_to_worker_processes(encoder):
    assert pickle.loads(pickle.dumps(encoder)).encode("q", answer="a") == encoder.encode("q", answer="a")


def test_wrong_input(encoder):
    with pytest.raises(InputError, match="there are chat, vqa, base"):
        encoder.encode("q", template="llama")
    with pytest.raises(InputError, match="the answer is list"):
        encoder.encode("q", answer=["a"])
    with pytest.raises(InputError, match=r"'Question: a\\ud83d Answer:' is not Unicode"):
        encoder.encode("a\ud83d")
    with pytest.raises(InputError, match="'wrong' is not a template"):
        Encoder(encoder.tokenizer, num_image_tokens=6, bos_id=0, eos_id=1, image_id=2, template="wrong")


def test_a_short_text_is_tokenised_once_and_a_long_one_is_not_kept(encoder, monkeypatch):
    asked = []
    tokenise = encoder.tokenizer.encode
    monkeypatch.setattr(encoder.tokenizer, "encode", lambda text, **more: asked.append(text) or tokenise(text, **more))
    fresh = Encoder(encoder.tokenizer, num_image_tokens=6, bos_id=256, eos_id=257, image_id=258, template="chat")
    first = fresh.answer_ids("yes")
    first.append(0)  # what a caller does with it changes nothing
    assert fresh.answer_ids("yes") == list(b"yes")
    assert fresh.answer_ids("y" * 300) == fresh.answer_ids("y" * 300)
    assert asked == ["yes", "y" * 300, "y" * 300]
    for number in range(5000):
        fresh.answer_ids(str(number))
    assert len(fresh._known) < 5000
