"""Parse request bodies: every field is honoured, or refused by its name.

The bodies are those of OpenAI's ``/v1/chat/completions``, with the further fields that servers of open models accept.
They are not parsed with OpenAI's types, which accept unknown fields and do not say which field is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.serve.refusals import Refusal, bad_request

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "min_p": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "ignore_eos": (None, False),
    "skip_special_tokens": (None, True),
    "stop_token_ids": (None, []),
    "verbosity": (None,),
}
"""Fields this server does not implement, and their neutral values: any other value is refused."""
_NOTED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields about the caller: they change no answer anywhere."""
_OWN = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed",
    "stream", "stream_options",
)  # fmt: skip
MOST_ANSWERS, MOST_STOPS = 16, 8


@dataclass(frozen=True)
class Message:
    """One turn: its text, and the addresses of its images and clips."""

    role: str
    text: str
    images: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatCall:
    """A parsed chat request.

    Attributes:
        question, history, images, clips: as for a generator; images and clips are still URLs.
        answers: how many (OpenAI's ``n``); answer i uses the seed ``seed`` + i.
    """

    model: str | None
    question: str
    history: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    decoding: Decoding
    seed: int | None
    stop: tuple[str, ...]
    answers: int
    stream: bool
    include_usage: bool
    clips: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreCall:
    """A parsed request for closed questions."""

    model: str | None
    images: tuple[str, ...]
    clips: tuple[str, ...]
    questions: tuple[ClosedQuestion, ...]


def read_chat(body: Any, default: Decoding, most_tokens: int) -> ChatCall:
    """Parse a body of ``/v1/chat/completions``.

    Args:
        default: sampling settings for fields that the request does not set.
        most_tokens: maximum length of an answer.

    Raises:
        Refusal: 400, naming the field.
    """
    fields = _mapping(body, None)
    for name, value in fields.items():
        if name in _NEUTRAL and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise bad_request(name, f"{name} is not supported here; leave it out", "unsupported_field")
        if name not in _NEUTRAL and name not in _OWN and name not in _NOTED:
            raise bad_request(name, f"there is no field {name!r}", "unknown_field")
    question, history, images, clips = _conversation(fields.get("messages"))
    stream = _boolean(fields, "stream")
    return ChatCall(
        model=_text_or_none(fields, "model"),
        question=question,
        history=history,
        images=images,
        decoding=_decoding(fields, default, most_tokens),
        seed=_whole(fields, "seed", -(2**63), 2**63 - 1),
        stop=_stops(fields.get("stop")),
        answers=_whole(fields, "n", 1, MOST_ANSWERS) or 1,
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream),
        clips=clips,
    )


def read_score(body: Any) -> ScoreCall:
    """Parse a body of ``/v1/score``: ``{"image": address, "questions": [{"question", "choices"}, ...]}``, or
    with ``video`` instead of ``image``.

    Raises:
        Refusal: 400, naming the field.
    """
    fields = _mapping(body, None)
    _refuse_unknown(fields, ("model", "image", "video", "questions"), "")
    image, video = _text_or_none(fields, "image"), _text_or_none(fields, "video")
    given = fields.get("questions")
    if not isinstance(given, list) or not given:
        raise bad_request("questions", "questions is a list of at least one {question, choices}")
    questions = []
    for number, one in enumerate(given):
        where = f"questions[{number}]"
        entry = _mapping(one, where)
        _refuse_unknown(entry, ("question", "choices"), where)
        query, choices = entry.get("question"), entry.get("choices")
        if not isinstance(query, str):
            raise bad_request(where, f"{where}.question is not a text")
        if (
            not isinstance(choices, list)
            or not choices
            or not all(isinstance(choice, str) and choice for choice in choices)
            or len(set(choices)) < len(choices)
        ):
            raise bad_request(where, f"{where}.choices is a list of different texts, at least one")
        questions.append(ClosedQuestion(query, tuple(choices)))
    images, clips = (() if address is None else (address,) for address in (image, video))
    return ScoreCall(_text_or_none(fields, "model"), images, clips, tuple(questions))


def _conversation(messages: Any) -> tuple[str, tuple[tuple[str, str], ...], tuple[str, ...], tuple[str, ...]]:
    """Return the last question, the turns before it, all images and all clips, from OpenAI's list of messages."""
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages", "messages is a list of at least one message")
    turns = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    system = ""
    if turns[0].role == "system":
        system = turns.pop(0).text
    if any(turn.role == "system" for turn in turns):
        raise bad_request("messages", "a system message stands at the beginning, and there is at most one")
    merged: list[Message] = []
    for turn in turns:  # a picture and its question often come as two messages of the user
        if merged and turn.role == merged[-1].role == "user":
            last = merged.pop()
            text = "\n".join(part for part in (last.text, turn.text) if part)
            turn = Message("user", text, last.images + turn.images, last.clips + turn.clips)
        merged.append(turn)
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(merged))]
    if [turn.role for turn in merged] != expected or len(merged) % 2 == 0:
        raise bad_request("messages", "user and assistant take turns, and the last message is the user's")
    texts = [turn.text for turn in merged]
    if system:
        texts[0] = f"{system}\n{texts[0]}"
    history = tuple(zip(texts[0:-1:2], texts[1:-1:2], strict=True))
    images = tuple(address for turn in merged for address in turn.images)
    return texts[-1], history, images, tuple(address for turn in merged for address in turn.clips)


def _message(message: Any, where: str) -> Message:
    fields = _mapping(message, where)
    for name, value in fields.items():
        if name not in ("role", "content", "name") and value not in (None, [], ""):
            raise bad_request(where, f"{where}.{name} is not supported here; leave it out", "unsupported_field")
    role = fields.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise bad_request(where, f"{where}.role is {role!r}; it is system, user or assistant")
    content = fields.get("content")
    if isinstance(content, str):
        return Message(role, content)
    if not isinstance(content, list):
        raise bad_request(where, f"{where}.content is a text or a list of parts")
    texts, images, clips = [], [], []
    for number, part in enumerate(content):
        at = f"{where}.content[{number}]"
        entry = _mapping(part, at)
        if entry.get("type") == "text" and isinstance(entry.get("text"), str):
            texts.append(entry["text"])
        elif entry.get("type") == "image_url" and role == "user":
            images.append(_address(entry.get("image_url"), at, "image"))
        elif entry.get("type") == "video_url" and role == "user":
            clips.append(_address(entry.get("video_url"), at, "video"))
        else:
            kind = entry.get("type")
            raise bad_request(
                at,
                f"{at} is of type {kind!r}; the user sends text and image_url, or to a video model video_url, others"
                " text alone",
            )
    return Message(role, "\n".join(texts), tuple(images), tuple(clips))


def _address(value: Any, where: str, kind: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("url"), str) and set(value) <= {"url", "detail"}:
        address: str = value["url"]
        return address
    raise bad_request(where, f'{where}.{kind}_url is {{"url": "data:{kind}/...;base64,..."}}')


def _decoding(fields: Mapping[str, Any], default: Decoding, most_tokens: int) -> Decoding:
    asked = [_whole(fields, name, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    limit = next((value for value in asked if value is not None), default.max_new_tokens)
    found = replace(default, max_new_tokens=min(limit, most_tokens))
    temperature = _number(fields, "temperature", 0, 2)
    top_p, top_k = _number(fields, "top_p", 0, 1), _whole(fields, "top_k", -1, 2**31)
    if top_p == 0:
        raise bad_request("top_p", "top_p is above 0 and at most 1")
    if temperature == 0:
        return Decoding(found.max_new_tokens)
    return found.changed(temperature=temperature, top_p=top_p, top_k=None if top_k is None else max(top_k, 0))


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise bad_request("stop", "stop is a text, or a list of texts, none of them empty")
    if len(found) > MOST_STOPS:
        raise bad_request("stop", f"stop has {len(found)} texts; at most {MOST_STOPS}")
    return tuple(found)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad_request("stream_options", "stream_options goes with stream: true only")
    fields = _mapping(value, "stream_options")
    _refuse_unknown(fields, ("include_usage",), "stream_options")
    return _boolean(fields, "include_usage")


def _mapping(value: Any, where: str | None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(where, f"{where or 'the body'} is not a JSON object")
    return value


def _refuse_unknown(fields: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in fields:
        if name not in known:
            raise bad_request(name, f"{where or 'the body'} has no field {name!r}", "unknown_field")


def _checked(fields: Mapping[str, Any], name: str, good: Callable[[Any], bool], wanted: str) -> Any:
    value = fields.get(name)
    if value is not None and not good(value):
        raise bad_request(name, f"{name} is {_short(value)}; it is {wanted}")
    return value


def _text_or_none(fields: Mapping[str, Any], name: str) -> str | None:
    value: str | None = _checked(fields, name, lambda value: isinstance(value, str), "a text")
    return value


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    return bool(_checked(fields, name, lambda value: isinstance(value, bool), "true or false"))


def _whole(fields: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    def good(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    value: int | None = _checked(fields, name, good, f"a whole number from {least} to {most}")
    return value


def _number(fields: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    def good(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

    value: float | None = _checked(fields, name, good, f"a number from {least:g} to {most:g}")
    return value


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["ChatCall", "Message", "Refusal", "ScoreCall", "read_chat", "read_score"]
