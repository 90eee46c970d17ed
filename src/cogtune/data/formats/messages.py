"""Conversations in other tools' forms: role names, system messages, ``<image>`` markers, content parts.

Supported are LLaVA (``conversations`` of ``from``/``value``, ``image``), ShareGPT and ms-swift (``messages`` or
``conversations``, ``images``) and OpenAI (``messages`` whose contents are lists of parts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cogtune.data.formats.clip_records import as_pictures
from cogtune.data.formats.item import Content, RecordRules
from cogtune.data.formats.markers import MARKER, without_markers
from cogtune.data.formats.pictures import keys_text, picture_sources, refuse_unread
from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import (
    MARKS,
    choices_of,
    identity_of,
    kind_of,
    require_trained,
    shown,
    trained_mark,
    without_blank_answer,
)
from cogtune.data.records import Turn
from cogtune.language import tr
from cogtune.system.names import is_unicode

_MARKER = "<image>"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_RECORD_KEYS = ("id", "image", "images", "messages", "conversations", "system", *_OTHER_MEDIA)
_MESSAGE_KEYS = ("from", "value", "role", "content", "image", "images", *MARKS)
_PICTURE_PART_KEYS = ("type", "image_url", "image", "url", "path")
# Qwen-VL's path tags, with the numbering before and the line break after them
_IMG = re.compile(r"(?:Picture[ ]*\d+[ ]*:[ ]*)?<img>\s*([^<>\n]+?)\s*</img>[ \t]*\n?")


@dataclass
class Message:
    """One message. ``number`` counts from 1 within the record; ``images`` are the images among its parts; ``choices``
    are the answers that a closed question allows."""

    number: int
    role: str
    text: str
    images: list[Any] = field(default_factory=list)
    trained: bool = True
    choices: tuple[str, ...] = ()


def read_conversation(record: Any, rules: RecordRules, expected: str) -> Content:
    """Parse the conversation and pictures of one record; ``expected`` is the format's name for messages.

    Raises:
        BadRecordError: a wrong shape, role, order or content; more pictures than the model takes, more markers than
            pictures; a system message where ``data.system`` refuses it.
    """
    if not isinstance(record, dict):
        raise BadRecordError("wrong-root", tr("{kind_of} found, an object was expected", kind_of=kind_of(record)))
    if rules.clips is not None:
        record = as_pictures(record)
    _refuse_other_media(record)
    messages = _messages(record, expected, rules.open_questions)
    if rules.choices:
        _take_choices(messages, record)
    for message in messages:
        _take_paths(message)
    images = [*_images_of(record), *(image for message in messages for image in message.images)]
    refuse_unread(record, _RECORD_KEYS, images, expected)
    for entry, number in _entries(record):
        where = tr("message {number}: ", number=number)
        refuse_unread(entry, _MESSAGE_KEYS, images, expected, where)
        for part in entry["content"] if isinstance(entry.get("content"), list | tuple) else ():
            if isinstance(part, dict):
                read = ("type", "text") if "text" in part else _PICTURE_PART_KEYS
                refuse_unread(part, read, images, expected, where)
    return content_of(messages, _images_of(record), identity_of(record), rules)


def content_of(messages: list[Message], listed: list[Any], identity: str | None, rules: RecordRules) -> Content:
    """Build the record of a conversation; ``listed`` are the pictures named beside it.

    Consecutive messages of the user are joined: some programs send the text in one and the picture in another. A
    question that is only a picture becomes ``data.caption_question``.

    Raises:
        BadRecordError: as `read_conversation` does.
    """
    for message in messages:
        _take_paths(message)
    images = [*listed, *(image for message in messages for image in message.images)]
    for message in messages:
        if message.images and message.role != "user":
            what = tr("a picture in message {number}, from {role}", number=message.number, role=message.role)
            raise BadRecordError("image-marker", what)
    if any(image is None for image in images):
        raise BadRecordError("image-path", tr("a picture is null, a path was expected"))
    rules.check_images(len(images))
    messages = _joined(messages)
    signs = ["late"] if _is_late(messages) else []
    _strip_markers(messages, len(images))
    for message in messages:
        if not message.text.strip() and message.role != "system":
            if not (message.role == "user" and images and rules.caption_question):
                what = tr("the content of message {number} is empty but for its picture", number=message.number)
                raise BadRecordError("content", what)
            message.text = rules.caption_question
            signs.append("asked")
    turns = _turns(_without_system(messages, rules.system), rules.open_questions)
    return Content([turns], picture_sources(images), identity, signs=tuple(signs))


def _joined(messages: list[Message]) -> list[Message]:
    """Return the messages with neighbouring ones of the user as one."""
    joined: list[Message] = []
    for message in messages:
        if joined and message.role == joined[-1].role == "user":
            before = joined[-1]
            text = "\n".join(part for part in (before.text, message.text) if part.strip())
            images, choices = [*before.images, *message.images], message.choices or before.choices
            joined[-1] = Message(before.number, "user", text, images, choices=choices)
        else:
            joined.append(message)
    return joined


def _is_late(messages: list[Message]) -> bool:
    """Return whether the first picture or marker stands in a later question than the first."""
    asked = [message for message in messages if message.role == "user"]
    shown_in = next((n for n, message in enumerate(asked) if message.images or MARKER.search(message.text)), 0)
    return shown_in > 0


def _refuse_other_media(record: dict[str, Any]) -> None:
    for key in _OTHER_MEDIA:
        if record.get(key):
            kind = "media-clips" if key.startswith("video") else "media"
            raise BadRecordError(kind, tr('"{key}" is given; the model takes pictures only', key=key))


def _images_of(record: dict[str, Any]) -> list[Any]:
    """Return pictures listed next to the conversation: ``image`` or ``images``, each one value or a list.

    Raises:
        BadRecordError: ``image-path``, for null in a list.
    """
    found: list[Any] = []
    for key in ("image", "images"):
        value = record.get(key)
        if isinstance(value, list | tuple):
            if any(one is None for one in value):
                raise BadRecordError("image-path", tr('a picture in "{key}" is null', key=key))
            found += value
        elif value is not None:
            found.append(value)
    return found


def _entries(record: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """Return the objects that the messages were read from, with their numbers from 1."""
    entries: Sequence[dict[str, Any]] = record["messages" if "messages" in record else "conversations"]
    return [(entry, number) for number, entry in enumerate(entries, start=1)]


def _take_choices(messages: list[Message], record: dict[str, Any]) -> None:
    """Give each question its possible answers; those beside the messages belong to the last one."""
    entries = {number: entry for entry, number in _entries(record)}
    asked = [message for message in messages if message.role == "user"]
    for message in asked:
        message.choices = choices_of(entries[message.number].get("choices"))
    if asked and not asked[-1].choices:
        asked[-1].choices = choices_of(record.get("choices"))


def _take_paths(message: Message) -> None:
    """Move the paths in ``<img>`` tags from a message's text to its pictures."""
    paths = _IMG.findall(message.text)
    if not paths:
        return
    if message.role != "user":
        raise BadRecordError(
            "image-marker",
            tr("an <img> picture in message {number}, from {role}", number=message.number, role=message.role),
        )
    message.images += paths
    message.text = _IMG.sub("", message.text)


def _messages(record: dict[str, Any], expected: str, open_questions: bool) -> list[Message]:
    keys = [key for key in ("messages", "conversations") if key in record]
    if len(keys) != 1:
        found = "both" if keys else tr("{keys_text} found", keys_text=keys_text(record))
        raise BadRecordError(
            "missing-key",
            tr('"messages" or "conversations" was expected ({expected}), {found}', expected=expected, found=found),
        )
    entries = record[keys[0]]
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise BadRecordError(
            "wrong-root", tr('"{keys}" is {kind_of}, a list was expected', keys=keys[0], kind_of=kind_of(entries))
        )
    if not len(entries):
        raise BadRecordError("turns", tr('"{keys}" is empty', keys=keys[0]))
    entries = without_blank_answer(entries) if open_questions else entries
    messages = [_message(entry, number) for number, entry in enumerate(entries, start=1)]
    for message, entry in zip(messages, entries, strict=True):
        message.images = [*_images_of(entry), *message.images]
    if record.get("system"):
        messages.insert(0, Message(0, "system", _text(record["system"], 0)))
    return messages


def _message(entry: Any, number: int) -> Message:
    if not isinstance(entry, dict):
        raise BadRecordError(
            "wrong-root",
            tr("message {number} is {kind_of}, an object was expected", number=number, kind_of=kind_of(entry)),
        )
    names = ("from", "value") if "from" in entry or "value" in entry else ("role", "content")
    for name in names:
        if name not in entry:
            raise BadRecordError("missing-key", tr('message {number} has no "{name}"', number=number, name=name))
    role = _ROLES.get(entry[names[0]]) if isinstance(entry[names[0]], str) else None
    if role is None:
        expected = " or ".join(f'"{name}"' for name in _ROLES)
        raise BadRecordError(
            "role",
            tr(
                "message {number} has the role {entry}, {expected} was expected",
                number=number,
                entry=shown(entry[names[0]]),
                expected=expected,
            ),
        )
    content = entry[names[1]]
    trained = trained_mark(entry, number, role)
    if isinstance(content, list | tuple):
        return _from_parts(content, number, role, trained)
    return Message(number, role, _text(content, number), trained=trained)


def _from_parts(parts: Sequence[Any], number: int, role: str, trained: bool) -> Message:
    message, texts = Message(number, role, "", trained=trained), []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None and isinstance(part, dict):  # Qwen-VL's parts have no type
            kind = next((key for key in ("text", "image") if key in part), None)
        if kind in ("text", "input_text", "output_text"):
            texts.append(_text(part.get("text"), number, blank=True))
        elif kind in ("image_url", "input_image", "image"):
            image = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            if image is None and kind == "image":
                texts.append(_MARKER)  # the picture itself is listed next to the messages
            elif image is None:
                raise BadRecordError(
                    "image-path", tr("message {number} has a part {kind} without a picture", number=number, kind=kind)
                )
            else:
                message.images.append(image)
        elif kind in ("video", "video_url", "input_video"):
            raise BadRecordError(
                "media-clips", tr("message {number} has a clip; the model takes pictures only", number=number)
            )
        else:
            found = tr("the type {kind}", kind=shown(kind)) if isinstance(part, dict) else kind_of(part)
            raise BadRecordError(
                "content-part",
                tr("message {number} has a part of {found}, text or image_url expected", number=number, found=found),
            )
    message.text = "\n".join(text for text in texts if text)
    if not message.text.strip() and not (message.images and role == "user"):
        raise BadRecordError("content", tr("the content of message {number} has no text", number=number))
    return message


def _text(value: Any, number: int, *, blank: bool = False) -> str:
    where = tr("the content of message {number}", number=number) if number else tr("the system text")
    if not isinstance(value, str):
        raise BadRecordError(
            "content", tr("{where} is {kind_of}, a text was expected", where=where, kind_of=kind_of(value))
        )
    if not is_unicode(value):
        raise BadRecordError("content", tr("{where} has half a surrogate pair, which is not a character", where=where))
    if not blank and not value.strip():
        raise BadRecordError("content", tr("{where} is empty", where=where))
    return value


def _strip_markers(messages: list[Message], images: int) -> None:
    """Remove the markers of pictures: the model's pictures always come before the text."""
    found = {message.number: MARKER.findall(message.text) for message in messages}
    markers = [marker for several in found.values() for marker in several]
    if not markers:
        return
    if len(markers) > max(images, 1):
        most = tr("one was") if images <= 1 else tr("{images} were", images=images)
        raise BadRecordError(
            "image-marker",
            tr(
                "{count} {marker} markers, at most {most} expected",
                count=len(markers),
                marker=markers[0],
                most=most,
            ),
        )
    if not images:
        raise BadRecordError(
            "image-marker", tr("a {markers} marker, but the record names no picture", markers=markers[0])
        )
    for message in messages:
        if not found[message.number]:
            continue
        if message.role != "user":
            what = tr(
                "a {found} marker in message {number}, from {role}",
                found=found[message.number][0],
                number=message.number,
                role=message.role,
            )
            raise BadRecordError("image-marker", what)
        message.text = without_markers(message.text)


def _without_system(messages: list[Message], policy: str) -> list[Message]:
    system = [message for message in messages if message.role == "system"]
    if not system:
        return messages
    if policy == "error":
        raise BadRecordError("system", tr("a system message, which the model's prompt has no place for"))
    rest = [message for message in messages if message.role != "system"]
    if len(system) > 1 or messages[0].role != "system" or not rest:
        raise BadRecordError("turns", tr("one system message before all others was expected"))
    first = rest[0]
    rest[0] = replace(first, text=f"{system[0].text}\n{first.text}")
    return rest


def _turns(messages: list[Message], open_questions: bool) -> tuple[Turn, ...]:
    for place, message in enumerate(messages):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            what = tr(
                "message {number} is from the {role}, the {expected} was expected",
                number=message.number,
                role=message.role,
                expected=expected,
            )
            raise BadRecordError("turns", what)
    if open_questions and len(messages) % 2:
        messages = [*messages, Message(0, "assistant", "")]
    if len(messages) % 2:
        raise BadRecordError(
            "turns", tr("{messages} messages, the last question has no answer", messages=len(messages))
        )
    return require_trained(
        tuple(
            Turn(q.text, a.text, a.trained, choices=q.choices)
            for q, a in zip(messages[::2], messages[1::2], strict=True)
        )
    )
