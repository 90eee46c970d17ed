"""Flat records: a question and its answer, or a caption, under keys of their own; in JSON, CSV and Parquet alike.

| what | keys |
| --- | --- |
| question | ``question``, ``query``, ``prompt``, ``instruction`` followed by ``input``, or ``input`` alone |
| its answer | ``answer``, ``response``, ``output``, ``completion`` |
| both as messages | ``prompt`` and ``completion``: lists of messages with ``role`` and ``content`` |
| what was said before | ``history``: a list of (question, answer) |
| caption | ``caption``, ``captions``, ``text``; its question is ``data.caption_question`` |
| possible answers, for `cogtune predict --choices data` | ``choices`` |
| picture | ``image``, ``images``, ``file_name`` |

A question or a referring expression with a box in place of an answer: `cogtune.data.formats.grounded`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cogtune.data.formats.grounded import columns_of, is_grounded, read_grounded
from cogtune.data.formats.item import Content, RecordRules
from cogtune.data.formats.messages import Message, content_of, read_conversation
from cogtune.data.formats.pictures import keys_text, picture_sources, refuse_unread
from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import checked_text, choices_of, identity_of, is_blank, kind_of
from cogtune.data.records import Turn
from cogtune.language import tr

PICTURES = ("image", "images", "file_name")
QUESTIONS = ("question", "query", "prompt", "instruction", "input")
ANSWERS = ("answer", "response", "output", "completion")
CAPTIONS = ("caption", "captions", "text")
_MORE = ("id", "history", "system")


def is_flat(keys: Collection[str]) -> bool:
    """Return whether a record with these keys (in lower case) is read here."""
    return any(key in keys for key in (*QUESTIONS, *PICTURES))


def missing(keys: Collection[str], *, open_questions: bool) -> bool:
    """Return whether these columns (in lower case) lack the texts of a record."""
    if columns_of(keys, QUESTIONS, (*ANSWERS, *CAPTIONS), open_boxes=open_questions):
        return False
    if any(key in keys for key in QUESTIONS):
        return not open_questions and not any(key in keys for key in (*ANSWERS, *CAPTIONS))
    return not open_questions and not any(key in keys for key in CAPTIONS)


def read_flat(record: Any, rules: RecordRules, form: str) -> Content:
    """Parse one record or row; ``form`` is the format's name for messages.

    Raises:
        BadRecordError: a missing or blank text, two keys for one thing, content under a key that is not read; and what
            `content_of` raises.
    """
    if not isinstance(record, Mapping):
        raise BadRecordError("wrong-root", tr("{kind} found, an object was expected", kind=kind_of(record)))
    row = {str(key).lower(): value for key, value in record.items()}
    if isinstance(row.get("prompt"), list | tuple) and isinstance(row.get("completion"), list | tuple):
        rest = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
        return read_conversation({**rest, "messages": [*row["prompt"], *row["completion"]]}, rules, form)
    pictures = _pictures(row)
    identity = None if is_blank(row.get("id")) else identity_of(row)
    asked = _one_of(row, QUESTIONS)
    used: list[str] = ["id", *asked]
    if is_grounded(row, QUESTIONS, (*ANSWERS, *CAPTIONS), open_boxes=rules.open_questions):
        dialogues, used = read_grounded(row, QUESTIONS, rules.box_question)
        used += ["id"]
        if not pictures:
            raise BadRecordError("image-path", tr("a box or an expression, and no picture"))
        refuse_unread(row, [*used, *PICTURES], pictures, form)
        rules.check_images(len(pictures))
        content = Content(dialogues, picture_sources(pictures), identity)
    elif asked:
        messages, more = _messages(row, asked, rules)
        used += more
        refuse_unread(row, [*used, *PICTURES], pictures, form)
        content = content_of(messages, pictures, identity, rules)
    else:
        dialogues, more = _captions(row, pictures, rules)
        used += more
        refuse_unread(row, [*used, *PICTURES], pictures, form)
        rules.check_images(len(pictures))
        content = Content(dialogues, picture_sources(pictures), identity)
    left = (key for key, value in row.items() if key not in (*used, *PICTURES) and not is_blank(value))
    return Content(content.dialogues, content.images, identity, unread=tuple(left), signs=content.signs)


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    """Return the pictures under ``image`` and ``images``, else the one under ``file_name``."""
    found: list[Any] = []
    for key in PICTURES:
        value = row.get(key)
        if value is None or (key == "file_name" and found):
            continue
        if isinstance(value, list | tuple):
            if any(one is None for one in value):
                raise BadRecordError("image-path", tr('a picture in "{key}" is null', key=key))
            found += value
        else:
            found.append(value)
    return found


def _one_of(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return which of ``keys`` the row has: one, or ``instruction`` and ``input``; none if it has none."""
    found = [key for key in keys if key in row]
    filled = [key for key in found if not is_blank(row[key])]
    if len(filled) > 1 and filled != ["instruction", "input"]:
        raise BadRecordError("missing-key", tr("{keys}: one of them was expected", keys=tr(", ").join(filled)))
    if filled == ["instruction", "input"] or len(found) == 1:
        return found
    return filled or found[:1]


def _messages(row: Mapping[str, Any], asked: Sequence[str], rules: RecordRules) -> tuple[list[Message], list[str]]:
    """Return the conversation of a row with a question, and the keys that were read for it."""
    question = "\n".join(checked_text(row[key], tr("the question")) for key in asked)
    answered = _one_of(row, ANSWERS)
    if not answered and not rules.open_questions:
        what = tr(
            "a question without an answer; one of {keys} was expected, found: {found}",
            keys=tr(", ").join(ANSWERS),
            found=keys_text(row),
        )
        raise BadRecordError("missing-key", what)
    answer = rules.answer(row.get(answered[0])) if answered else ""
    texts = [*_history(row.get("history")), question, answer]
    messages = [Message(n, "assistant" if n % 2 == 0 else "user", text) for n, text in enumerate(texts, start=1)]
    if rules.choices:
        messages[-2].choices = choices_of(row.get("choices"))
    if not answer:
        messages.pop()
    if not is_blank(row.get("system")):
        messages.insert(0, Message(0, "system", checked_text(row["system"], tr("the system text"))))
    return messages, [*answered, "history", "system", *(["choices"] if rules.choices else [])]


def _history(value: Any) -> list[str]:
    if is_blank(value):
        return []
    if not isinstance(value, list | tuple):
        raise BadRecordError("content", tr("the history is {kind}, a list of pairs was expected", kind=kind_of(value)))
    texts: list[str] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRecordError("content", tr("an entry of the history is no pair of a question and its answer"))
        texts += [checked_text(text, tr("a text of the history")) for text in pair]
    return texts


def _captions(
    row: Mapping[str, Any], pictures: Sequence[Any], rules: RecordRules
) -> tuple[list[tuple[Turn, ...]], list[str]]:
    """Return a dialogue for each caption of a row without a question, and the keys that were read for it."""
    found = [key for key in CAPTIONS if key in row]
    if not found and not (rules.open_questions and pictures):
        raise BadRecordError(
            "missing-key", tr("no question, conversation or caption in it; found: {found}", found=keys_text(row))
        )
    if len(found) > 1:
        found = [key for key in found if not is_blank(row[key])]
        if len(found) != 1:
            keys = tr(", ").join(found) or tr("none with a text")
            raise BadRecordError("missing-key", tr("one caption was expected, found: {keys}", keys=keys))
    if not pictures:
        raise BadRecordError("image-path", tr("a caption, and no picture"))
    question = rules.caption_question
    if not question:
        raise BadRecordError("caption-question", tr("captions, and data.caption_question is empty"))
    if not found:
        return [(Turn(question, ""),)], []
    value = row[found[0]]
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts:
        raise BadRecordError("content", tr("the list of captions is empty"))
    return [(Turn(question, checked_text(text, tr("the caption"))),) for text in texts], found
