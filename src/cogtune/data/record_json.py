"""Parse a label's text into turns: JSON, record shape, roles and contents. No file is opened here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cogtune.data.problems import BadRecordError
from cogtune.data.records import Turn
from cogtune.language import phrase, tr
from cogtune.system.names import is_unicode

MAX_TURNS = 1000

# A string literal (kept), or a comma before a closing bracket (dropped). A string without an end goes to the end of the
# text, so that it is looked at once.
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+(?:"|\\?\Z))|,(?=\s*[\]}])', re.DOTALL)


def parse_json(data: bytes) -> tuple[Any, bool]:
    """Parse UTF-8 JSON, with or without a byte order mark, and return ``(value, repaired)``.

    Commas before a closing bracket, as in the sample on the published data set's card, are accepted and reported as a
    repair.

    Raises:
        BadRecordError: ``bad-json`` with the position.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError("bad-json", tr("not UTF-8 (byte {start})", start=error.start)) from error
    try:
        return json.loads(text, object_pairs_hook=_object), False
    except (ValueError, RecursionError) as error:
        without_commas = _TRAILING_COMMA.sub(lambda match: match.group(1) or "", text)
        if without_commas != text:
            try:
                return json.loads(without_commas, object_pairs_hook=_object), True
            except (ValueError, RecursionError):
                pass  # report the error in the text as written
        found = tr("not valid JSON ({error})", error=error) if text.strip() else tr("empty, a record was expected")
        raise BadRecordError("bad-json", found) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of ``pairs``; of a repeated key JSON would keep the last value and lose the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name in counts if counts[name] > 1)
        raise BadRecordError(
            "bad-json", tr("the key {dumps:.80} stands twice in one object", dumps=json.dumps(repeated))
        )
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""For values that stand one after another in a text."""


def of_readable_length(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return ``turns``, if they are at most `MAX_TURNS`: every answer is trained with its history.

    Raises:
        BadRecordError: ``many-turns``.
    """
    if len(turns) > MAX_TURNS:
        raise BadRecordError(
            "many-turns",
            tr("a conversation of {count} turns; at most {most} are read", count=len(turns), most=MAX_TURNS),
        )
    return turns


def by_identity(entries: Sequence[Any], key: str) -> tuple[dict[str | float, dict[str, Any]], set[str | float]]:
    """The objects among ``entries`` by their ``key``, a text or a number, and the keys that stand there twice."""
    found: dict[str | float, dict[str, Any]] = {}
    repeated = set()
    for entry in entries:
        identity = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(identity, (str, int, float)):
            repeated |= {identity} & found.keys()
            found[identity] = entry
    return found, repeated


def checked_identity(value: Any, repeated: set[str | float], what: str) -> str | float:
    """``value``, which messages call ``what``, if it names one thing.

    Raises:
        BadRecordError: ``id``, ``duplicate-id``.
    """
    if not isinstance(value, (str, int, float)):
        raise BadRecordError(
            "id", tr("{what} is {value}, a text or a whole number was expected", what=what, value=shown(value))
        )
    if value in repeated:
        raise BadRecordError(
            "duplicate-id", tr("{what} {value} stands there more than once", what=what, value=shown(value))
        )
    return value


def record_dialogues(
    record: Any, caption_question: str | None, *, open_questions: bool = False, choices: bool = False
) -> list[tuple[Turn, ...]]:
    """Return a record's independent dialogues: one for ``conversations``, one per entry of ``captions``.

    ``choices``: read those of its questions too.

    Raises:
        BadRecordError: for a wrong shape, role, order or content; the message says which turn.
    """
    if not isinstance(record, dict):
        raise BadRecordError("wrong-root", tr("{kind_of} found, an object was expected", kind_of=kind_of(record)))
    keys = [key for key in ("conversations", "captions") if key in record]
    if len(keys) != 1:
        found = tr("both") if keys else tr(", ").join(map(str, record)) or tr("nothing")
        raise BadRecordError(
            "missing-key", tr('"conversations" or "captions" was expected, found: {found}', found=found)
        )
    entries = record[keys[0]]
    if not isinstance(entries, list):
        raise BadRecordError(
            "wrong-root", tr('"{keys}" is {kind_of}, a list was expected', keys=keys[0], kind_of=kind_of(entries))
        )
    if not entries:
        raise BadRecordError("turns", tr('"{keys}" is empty', keys=keys[0]))
    if keys[0] == "conversations":
        return [_dialogue(entries, open_questions, choices)]
    if not caption_question:
        raise BadRecordError("caption-question", tr("a record of captions, and data.caption_question is empty"))
    captions = [_content(entry, number, ("caption",)) for number, entry in enumerate(entries, start=1)]
    return [(Turn(caption_question, caption),) for caption in captions]


MARKS = ("weight", "loss", "train")
"""Keys of an assistant's message that say whether it is trained, as OpenAI, ms-swift and axolotl write them."""


def trained_mark(entry: dict[str, Any], number: int, role: str) -> bool:
    """Return whether message ``number`` (from 1) is marked as one to train, which unmarked answers are.

    Raises:
        BadRecordError: ``marks``: a value other than yes and no, or a question that is to be trained.
    """
    trained = True
    for key in MARKS:
        value = entry.get(key)
        if value is None or (role != "assistant" and (not value or key == "weight")):
            continue
        if role != "assistant" or value not in (0, 1):
            what = tr(
                "message {number}, from {role}, has {key} {value}; only answers are trained, wholly (1) or not (0)",
                number=number,
                role=role,
                key=key,
                value=shown(value),
            )
            raise BadRecordError("marks", what)
        trained = trained and bool(value)
    return trained


def require_trained(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return ``turns``; raise BadRecordError ``marks`` if none of their answers is trained."""
    if not any(turn.trained for turn in turns):
        raise BadRecordError("marks", tr("every answer is marked as not to be trained"))
    return turns


def _dialogue(entries: list[Any], open_questions: bool, closed: bool) -> tuple[Turn, ...]:
    contents, trained, choices = [], [], []
    references: list[tuple[str, ...]] = []
    entries = without_blank_answer(entries) if open_questions else entries
    for number, entry in enumerate(entries, start=1):
        contents.append(_content(entry, number, ("user", "assistant")))
        trained.append(trained_mark(entry, number, entry["role"]))
        references.append(_references(entry, number))
        choices.append(choices_of(entry.get("choices")) if closed else ())
        expected = "user" if number % 2 else "assistant"
        if entry["role"] != expected:
            raise BadRecordError(
                "turns",
                tr(
                    'message {number} is from "{role}", "{expected}" was expected',
                    number=number,
                    role=entry["role"],
                    expected=expected,
                ),
            )
    if open_questions and len(contents) % 2:
        contents.append("")
        trained.append(True)
        references.append(())
    if len(contents) % 2:
        raise BadRecordError(
            "turns", tr("{contents} messages, the last question has no answer", contents=len(contents))
        )
    turns = map(Turn, contents[::2], contents[1::2], trained[1::2], references[1::2], choices[::2])
    return require_trained(tuple(turns))


def _references(entry: dict[str, Any], number: int) -> tuple[str, ...]:
    """All right answers of a message, its content among them, if it lists any under "references".

    Raises:
        BadRecordError: ``content``.
    """
    listed = entry.get("references")
    if listed is None:
        return ()
    if not isinstance(listed, list):
        what = tr(
            'the "references" of message {number} are {kind}, a list was expected', number=number, kind=kind_of(listed)
        )
        raise BadRecordError("content", what)
    checked = [checked_text(text, tr("a reference of message {number}", number=number)) for text in listed]
    return tuple(checked if entry["content"] in checked else [entry["content"], *checked])


def choices_of(value: Any) -> tuple[str, ...]:
    """The answers that a question allows: a list of texts, or one text with them joined by commas; () for a blank one.

    Raises:
        BadRecordError: ``content``, for anything else, and for fewer than two different ones.
    """
    if is_blank(value):
        return ()
    if isinstance(value, str):
        value = parse_json(value.encode("utf-8", "replace"))[0] if value.lstrip().startswith("[") else value.split(",")
    if not isinstance(value, list | tuple):
        raise BadRecordError("content", tr('"choices" is {kind}, a list was expected', kind=kind_of(value)))
    found = tuple(checked_text(choice, tr("a choice")).strip() for choice in value)
    if len(set(found)) < max(2, len(found)):
        raise BadRecordError("content", tr('"choices" are {found}, different ones were expected', found=shown(found)))
    return found


def _content(entry: Any, number: int, roles: tuple[str, ...]) -> str:
    """Return the checked content of message ``number`` (from 1)."""
    if not isinstance(entry, dict):
        raise BadRecordError(
            "wrong-root",
            tr("message {number} is {kind_of}, an object was expected", number=number, kind_of=kind_of(entry)),
        )
    for key in ("role", "content"):
        if key not in entry:
            raise BadRecordError("missing-key", tr('message {number} has no "{key}"', number=number, key=key))
    role, content = entry["role"], entry["content"]
    if role not in roles:
        expected = " or ".join(f'"{name}"' for name in roles)
        raise BadRecordError(
            "role",
            tr(
                "message {number} has the role {dumps:.80}, {expected} was expected",
                number=number,
                dumps=json.dumps(role),
                expected=expected,
            ),
        )
    return checked_text(content, tr("the content of message {number}", number=number))


def without_blank_answer(entries: Sequence[Any]) -> list[Any]:
    """The messages without a last one that is an assistant's and says nothing: the place of an answer to come."""
    last = entries[-1] if entries else None
    if isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt"):
        return list(entries if not is_blank(last.get("content", last.get("value"))) else entries[:-1])
    return list(entries)


def is_blank(value: Any) -> bool:
    """Whether a content says nothing: null, an empty list, or a text of white space."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def checked_text(value: Any, what: str) -> str:
    """Return ``value`` if it is a non-blank string; ``what`` names it in the message.

    Raises:
        BadRecordError: ``content``.
    """
    if not isinstance(value, str):
        raise BadRecordError(
            "content", tr("{what} is {kind_of}, a text was expected", what=what, kind_of=kind_of(value))
        )
    if not value.strip():
        raise BadRecordError("content", tr("{what} is empty", what=what))
    if not is_unicode(value):
        raise BadRecordError("content", tr("{what} has half a surrogate pair, which is not a character", what=what))
    return value


def identity_of(record: dict[str, Any]) -> str | None:
    """Return the record's own id, or None.

    Raises:
        BadRecordError: ``id``, if it is neither a string nor a whole number.
    """
    if "id" not in record:
        return None
    identity = record["id"]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or not is_unicode(str(identity)):
        raise BadRecordError("id", tr('"id" is {identity}', identity=shown(identity)))
    if not str(identity).strip():
        raise BadRecordError("id", tr('"id" is empty'))
    return str(identity)


def shown(value: Any, limit: int = 80) -> str:
    """Return ``value`` for a message, with at most ``limit`` characters."""
    text = repr(value[:limit] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    name = _KINDS.get(type(value))
    return type(value).__name__ if name is None else tr(name)


_KINDS: dict[type, str] = {
    bool: phrase("a boolean"),
    int: phrase("a number"),
    float: phrase("a number"),
    str: phrase("a text"),
    list: phrase("a list"),
    dict: phrase("an object"),
}
