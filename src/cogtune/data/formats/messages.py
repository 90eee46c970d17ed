"""Conversations as other tools write them: roles and their names, system messages, ``<image>`` markers, content parts.

Read here are LLaVA (``conversations`` of ``from``/``value``, ``image``), ShareGPT and ms-swift (``messages`` or
``conversations``, ``images``) and OpenAI (``messages`` whose contents are lists of parts).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlparse

from cogtune.data.formats.item import Content, Embedded, PictureSource, RecordRules
from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import identity_of, is_unicode, kind_of
from cogtune.data.records import Turn

MARKER = "<image>"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
# the marker with the line break (or space) that separates it from the text, on one side
_MARKER_AND_BREAK = re.compile(r"<image>[ \t]*\n|\n[ \t]*<image>|<image>[ ]?", re.DOTALL)


@dataclass
class _Message:
    """``number`` counts the record's messages from 1; ``images`` are those among its parts."""

    number: int
    role: str
    text: str
    images: list[Any] = field(default_factory=list)


def read_conversation(record: Any, rules: RecordRules, expected: str) -> Content:
    """The conversation and the pictures of one record; ``expected`` is the format's name, for messages.

    Raises:
        BadRecordError: a wrong shape, role, order or content; more pictures than the model takes, more markers than
            pictures; a system message where ``data.system`` refuses it.
    """
    if not isinstance(record, dict):
        raise BadRecordError("wrong-root", f"{kind_of(record)} found, an object was expected")
    _refuse_other_media(record)
    messages = _messages(record, expected)
    images = [*_images_of(record), *(image for message in messages for image in message.images)]
    rules.check_images(len(images))
    _strip_markers(messages, len(images))
    turns = _turns(_without_system(messages, rules.system))
    return Content([turns], picture_sources(images), identity_of(record))


def picture_sources(images: Sequence[Any]) -> tuple[PictureSource, ...]:
    """What a record says about its pictures; an entry that is None is none.

    Raises:
        BadRecordError: see `picture_source`.
    """
    return tuple(source for image in images if (source := picture_source(image)) is not None)


def picture_source(image: Any) -> str | Embedded | None:
    """What a record says about its picture, as a path or bytes.

    Understood are paths, ``file:`` and ``data:`` URLs, ``{"bytes": ..., "path": ...}``, ``{"url": ...}``.

    Raises:
        BadRecordError: ``image-path``, ``image-url``.
    """
    if image is None:
        return None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Embedded(bytes(image))
    if isinstance(image, Mapping):
        for key in ("bytes", "path", "url", "image"):
            if image.get(key) is not None:
                return picture_source(image[key])
        raise BadRecordError("image-path", f"the picture is an object with {_keys(image)}, bytes or a path expected")
    if not isinstance(image, str) or not image.strip() or "\0" in image or not is_unicode(image):
        raise BadRecordError("image-path", f"the picture is {image!r:.80}, a path was expected")
    scheme = urlparse(image).scheme.lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", image) else ""
    if scheme == "data":
        return Embedded(_data_url(image))
    if scheme == "file":
        return unquote(urlparse(image).path)
    if scheme in ("http", "https", "ftp", "s3", "gs", "oss"):
        raise BadRecordError("image-url", f"the picture is on the web ({image:.80}); a file was expected")
    return image


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise BadRecordError("image-url", "a data: URL without a comma before its content")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(re.sub(r"\s", "", body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecordError("image-url", f"a data: URL that is not valid base64 ({error})") from error


def _keys(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, mapping)) or "nothing"


def _refuse_other_media(record: dict[str, Any]) -> None:
    for key in _OTHER_MEDIA:
        if record.get(key):
            raise BadRecordError("media", f'"{key}" is given; the model takes pictures only')


def _images_of(record: dict[str, Any]) -> list[Any]:
    """Pictures that stand beside the conversation: ``image`` (one, or a list) or ``images`` (a list, or one)."""
    found: list[Any] = []
    for key in ("image", "images"):
        value = record.get(key)
        if isinstance(value, list | tuple):
            found += value
        elif value is not None:
            found.append(value)
    return found


def _messages(record: dict[str, Any], expected: str) -> list[_Message]:
    keys = [key for key in ("messages", "conversations") if key in record]
    if len(keys) != 1:
        found = "both" if keys else f"{_keys(record)} found"
        raise BadRecordError("missing-key", f'"messages" or "conversations" was expected ({expected}), {found}')
    entries = record[keys[0]]
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise BadRecordError("wrong-root", f'"{keys[0]}" is {kind_of(entries)}, a list was expected')
    if not len(entries):
        raise BadRecordError("turns", f'"{keys[0]}" is empty')
    messages = [_message(entry, number) for number, entry in enumerate(entries, start=1)]
    if record.get("system"):
        messages.insert(0, _Message(0, "system", _text(record["system"], 0)))
    return messages


def _message(entry: Any, number: int) -> _Message:
    if not isinstance(entry, dict):
        raise BadRecordError("wrong-root", f"message {number} is {kind_of(entry)}, an object was expected")
    names = ("from", "value") if "from" in entry or "value" in entry else ("role", "content")
    for name in names:
        if name not in entry:
            raise BadRecordError("missing-key", f'message {number} has no "{name}"')
    role = _ROLES.get(entry[names[0]]) if isinstance(entry[names[0]], str) else None
    if role is None:
        expected = " or ".join(f'"{name}"' for name in _ROLES)
        raise BadRecordError("role", f"message {number} has the role {entry[names[0]]!r}, {expected} was expected")
    content = entry[names[1]]
    if isinstance(content, list | tuple):
        return _from_parts(content, number, role)
    return _Message(number, role, _text(content, number))


def _from_parts(parts: Sequence[Any], number: int, role: str) -> _Message:
    message, texts = _Message(number, role, ""), []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text"):
            texts.append(_text(part.get("text"), number, blank=True))
        elif kind in ("image_url", "input_image", "image"):
            image = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            if image is None and kind == "image":
                texts.append(MARKER)  # the picture itself stands beside the messages
            else:
                message.images.append(image)
        else:
            found = f"the type {kind!r}" if isinstance(part, dict) else kind_of(part)
            raise BadRecordError("content-part", f"message {number} has a part of {found}, text or image_url expected")
    message.text = "\n".join(text for text in texts if text)
    if not message.text.strip():
        raise BadRecordError("content", f"the content of message {number} has no text")
    return message


def _text(value: Any, number: int, *, blank: bool = False) -> str:
    where = f"the content of message {number}" if number else "the system text"
    if not isinstance(value, str):
        raise BadRecordError("content", f"{where} is {kind_of(value)}, a text was expected")
    if not is_unicode(value):
        raise BadRecordError("content", f"{where} has half a surrogate pair, which is no character")
    if not blank and not value.strip():
        raise BadRecordError("content", f"{where} is empty")
    return value


def _strip_markers(messages: list[_Message], images: int) -> None:
    """Remove the ``<image>`` that stand for pictures; the model's pictures are always before the text."""
    counts = {message.number: message.text.count(MARKER) for message in messages}
    total = sum(counts.values())
    if not total:
        return
    if total > max(images, 1):
        most = "one was" if images <= 1 else f"{images} were"
        raise BadRecordError("image-marker", f"{total} {MARKER} markers, at most {most} expected")
    if not images:
        raise BadRecordError("image-marker", f"a {MARKER} marker, but the record names no picture")
    for message in messages:
        if not counts[message.number]:
            continue
        if message.role != "user":
            raise BadRecordError("image-marker", f"a {MARKER} marker in message {message.number}, from {message.role}")
        message.text = _MARKER_AND_BREAK.sub("", message.text, count=counts[message.number])
        if not message.text.strip():
            raise BadRecordError("content", f"the content of message {message.number} is empty but for its marker")


def _without_system(messages: list[_Message], policy: str) -> list[_Message]:
    system = [message for message in messages if message.role == "system"]
    if not system:
        return messages
    if policy == "error":
        raise BadRecordError("system", "a system message, which the model's prompt has no place for")
    rest = [message for message in messages if message.role != "system"]
    if len(system) > 1 or messages[0].role != "system" or not rest:
        raise BadRecordError("turns", "one system message before all others was expected")
    first = rest[0]
    rest[0] = _Message(first.number, first.role, f"{system[0].text}\n{first.text}", first.images)
    return rest


def _turns(messages: list[_Message]) -> tuple[Turn, ...]:
    for place, message in enumerate(messages):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            what = f"message {message.number} is from the {message.role}, the {expected} was expected"
            raise BadRecordError("turns", what)
    if len(messages) % 2:
        raise BadRecordError("turns", f"{len(messages)} messages, the last question has no answer")
    return tuple(Turn(q.text, a.text) for q, a in zip(messages[::2], messages[1::2], strict=True))
