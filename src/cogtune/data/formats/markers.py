"""Image markers of other models' data: they stand for a picture and must not be trained as text.

The model's pictures always come before the text, so a marker only says that there is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cogtune.data.problems import BadRecordError
from cogtune.data.records import Turn
from cogtune.language import tr

_ONE = "|".join(
    (
        r"<im_start>\s*<image>\s*<im_end>",  # LLaVA
        r"<\|vision_start\|>(?:<\|image_pad\|>)*<\|vision_end\|>|(?:<\|image_pad\|>)+",  # Qwen2-VL
        r"<img>\s*(?:<image>|(?:<IMG_CONTEXT>)*)\s*</img>|(?:<IMG_CONTEXT>)+",  # InternVL
        r"<image>\s*</image>|<image_?\d*>",  # MiniCPM-V, LLaVA, InternVL
        r"<\|image(?:_\d+)?\|>",  # Phi-3, Llama 3.2
        r"<image_placeholder>|<ImageHere>",  # DeepSeek-VL, InternLM-XComposer
    )
)
MARKER = re.compile(_ONE, re.IGNORECASE)
# the marker, with the line break or space that separates it from the text on one side
_WITH_BREAK = re.compile(rf"(?:{_ONE})[ \t]*\n|\n[ \t]*(?:{_ONE})|(?:{_ONE})[ ]?", re.IGNORECASE)
_TAG = re.compile(r"<[^<>\n]{0,40}(?:image|img)[^<>\n]{0,40}>", re.IGNORECASE)


def without_markers(text: str) -> str:
    """Return ``text`` without its markers."""
    return _WITH_BREAK.sub("", text)


def strip_ends(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """Return ``turns`` without the markers at either end of the questions, as many as there are pictures.

    Raises:
        BadRecordError: ``content``, if a question consists of markers only.
    """
    if not images or not any("<" in turn.question for turn in turns):
        return turns
    return tuple(_strip_turn(turn, number, images) for number, turn in enumerate(turns, start=1))


def _strip_turn(turn: Turn, number: int, images: int) -> Turn:
    text = turn.question
    for _ in range(images):
        matches = _WITH_BREAK.finditer(text)
        found = next((one for one in matches if not text[: one.start()].strip() or not text[one.end() :].strip()), None)
        if found is None:
            break
        text = text[: found.start()] + text[found.end() :]
    if not text.strip():
        raise BadRecordError("content", tr("question {number} is empty but for its marker", number=number))
    return turn if text == turn.question else Turn(text, turn.answer)


def left_tag(turns: Sequence[Turn]) -> str | None:
    """Return a tag that looks like a marker in a question, or a marker in an answer, which would be trained as text."""
    for turn in turns:
        for pattern, text in ((_TAG, turn.question), (MARKER, turn.answer)):
            found = pattern.search(text) if "<" in text else None
            if found is not None:
                return found.group()
    return None
