"""Records of referring expressions with boxes, as RefCOCO's are passed on: an expression, its box, a picture.

| what | keys |
| --- | --- |
| box | ``bbox``, ``bboxes``, ``box``, ``boxes``: four numbers, or a list of such |
| expression, asked with ``data.box_question`` | ``expression``, ``sent``, ``sentence``, ``phrase``; plural: several |
| or a question as it is asked | ``question`` and its like |
| the size that pixels count in | ``width``, ``height`` |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cogtune.data.boxes import Box
from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import checked_text, is_blank, shown
from cogtune.data.records import RawBoxes, Turn
from cogtune.language import tr

BOXES = ("bbox", "bboxes", "box", "boxes")
EXPRESSIONS = ("expression", "expressions", "sent", "sents", "sentence", "sentences", "phrase", "phrases")
SIZES = ("width", "height")
_FARTHEST = 1e9
EXPRESSION = "{expression}"
"""The place of the expression in ``data.box_question``."""


def is_grounded(row: Mapping[str, Any], questions: Sequence[str], answers: Sequence[str], *, open_boxes: bool) -> bool:
    """Return whether a row is read here: a box, or an expression to be found, and no other answer."""
    if any(not is_blank(row.get(key)) for key in answers):
        return False
    asks = any(not is_blank(row.get(key)) for key in EXPRESSIONS)
    boxed = any(not is_blank(row.get(key)) for key in BOXES)
    return (boxed and (asks or any(not is_blank(row.get(key)) for key in questions))) or (asks and open_boxes)


def columns_of(keys: Collection[str], questions: Sequence[str], answers: Sequence[str], *, open_boxes: bool) -> bool:
    """Return whether a table with these columns (in lower case) holds such rows."""
    asks = any(key in keys for key in (*EXPRESSIONS, *questions))
    no_answers = not any(key in keys for key in answers)
    return asks and no_answers and (open_boxes or any(key in keys for key in BOXES))


def read_grounded(
    row: Mapping[str, Any], question_keys: Sequence[str], box_question: str
) -> tuple[list[tuple[Turn, ...]], list[str]]:
    """Return a dialogue for each expression of a row, and the keys that were read for it.

    The answer stands as the numbers are written until `convert_boxes` knows the picture.

    Raises:
        BadRecordError: several keys for one thing, numbers that are no box, an expression that is no text.
    """
    box_keys = [key for key in BOXES if not is_blank(row.get(key))]
    asked = [key for key in (*EXPRESSIONS, *question_keys) if not is_blank(row.get(key))]
    for keys in (box_keys, asked):
        if len(keys) > 1:
            raise BadRecordError("missing-key", tr("{keys}: one of them was expected", keys=tr(", ").join(keys)))
    (key,) = asked
    boxes = _boxes(row[box_keys[0]], box_keys[0]) if box_keys else ()
    raw = RawBoxes(boxes, _size(row)) if boxes else None
    answer = json.dumps([list(box) for box in boxes]) if boxes else ""
    texts = [row[key]] if key in question_keys else _expressions(row[key])
    questions = [checked_text(text, tr("the question")) for text in texts]
    if key not in question_keys:
        questions = [box_question.replace(EXPRESSION, text.strip()) for text in questions]
    return [(Turn(text, answer, boxes=raw),) for text in questions], [*box_keys, *asked, *SIZES]


def _expressions(value: Any) -> list[Any]:
    values = value if isinstance(value, list | tuple) else [value]
    # RefCOCO's sentences are objects, with the text as people wrote it under "sent" or "raw"
    return [one.get("sent", one.get("raw")) if isinstance(one, Mapping) else one for one in values]


def _boxes(value: Any, key: str) -> tuple[Box, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    several = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)
    boxes = value if several else [value]
    found: list[Box] = []
    for box in boxes:
        numbers = list(box) if isinstance(box, list | tuple) else []
        plain = all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers)
        if len(numbers) != 4 or not plain or not all(-_FARTHEST < one < _FARTHEST for one in numbers):
            what = tr('"{key}" is {value}, four numbers were expected', key=key, value=shown(box))
            raise BadRecordError("box-form", what)
        found.append((float(numbers[0]), float(numbers[1]), float(numbers[2]), float(numbers[3])))
    return tuple(found)


def _size(row: Mapping[str, Any]) -> tuple[float, float] | None:
    try:
        width, height = (float(row.get(key) or 0) for key in SIZES)
    except (TypeError, ValueError, OverflowError):
        return None
    return (width, height) if 0 < width < _FARTHEST and 0 < height < _FARTHEST else None
