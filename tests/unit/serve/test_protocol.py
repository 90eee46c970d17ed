"""Request bodies: every field of OpenAI's API is honoured, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from cogtune.generate.decoding import Decoding
from cogtune.serve.protocol import _NEUTRAL, _NOTED, _OWN, read_chat, read_score
from cogtune.serve.refusals import Refusal

DEFAULT = Decoding(max_new_tokens=100)
FIRST = "messages[0]"
ASK = [{"role": "user", "content": "What is this?"}]


def _read(**fields: Any) -> Any:
    return read_chat({"messages": ASK, **fields}, DEFAULT, 500)


def test_every_field_of_openais_api_has_a_place() -> None:
    """So that a new release of its package shows here what it added."""
    known = {*_NEUTRAL, *_NOTED, *_OWN}
    fields = set(CompletionCreateParamsBase.__annotations__)
    missing = fields - known - {"moderation", "prompt_cache_options", "prompt_cache_retention"}
    assert not missing, f"openai's API has {missing}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": True}, "frequency_penalty"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 9}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "other"),
        ({"best_of": 3}, "best_of"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": [*ASK, {"role": "system", "content": "Hi"}, *ASK]}, "messages"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{**ASK[0], "tool_calls": [1]}]}, "messages[0]"),
        ({"model": 5}, "model"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        _read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.body()["error"]["message"]


def test_values_that_ask_for_nothing_are_taken() -> None:
    plain = _read()
    assert _read(**{name: values[-1] for name, values in _NEUTRAL.items()}, user="me", metadata={"a": "b"}) == plain


def test_a_body_that_is_none_is_refused() -> None:
    for body in ([], None, "text", 5):
        with pytest.raises(Refusal, match="not a JSON object"):
            read_chat(body, DEFAULT, 500)


def test_sampling_follows_the_request() -> None:
    assert _read().decoding == DEFAULT
    assert _read(temperature=0, top_p=0.5).decoding == DEFAULT
    drawn = _read(temperature=0.7, top_p=0.9, top_k=-1, max_tokens=7).decoding
    assert drawn == Decoding(7, sample=True, temperature=0.7, top_p=0.9)
    assert _read(max_tokens=7, max_completion_tokens=9).decoding.max_new_tokens == 9
    assert _read(max_tokens=9999).decoding.max_new_tokens == 500


def test_a_conversation_becomes_question_history_and_images() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture]},
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "text", "text": "Really."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
        {"role": "user", "content": "Colour?"},
    ]
    call = _read(messages=messages, stop="x", n=2, seed=-3)
    assert call.history == (("Be brief.\nWhat?\nReally.", "A bus."),)
    assert (call.question, call.images, call.stop, call.answers, call.seed) == ("Colour?", ("data:x",), ("x",), 2, -3)


def test_closed_questions() -> None:
    call = read_score({"questions": [{"question": "Red?", "choices": ["yes", "no"]}], "image": "data:x"})
    assert (call.images, call.questions[0].choices) == (("data:x",), ("yes", "no"))
    for body in (
        {},
        {"questions": []},
        {"questions": [{"question": "Red?", "choices": []}]},
        {"questions": [{"question": "Red?", "choices": ["a", "a"]}]},
        {"questions": [{"question": 5, "choices": ["a"]}]},
        {"questions": [{"question": "Red?", "choices": ["a"], "more": 1}]},
        {"questions": ["Red?"]},
    ):
        with pytest.raises(Refusal):
            read_score(body)
