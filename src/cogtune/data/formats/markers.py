"""Image markers of other models' data: they stand for a picture and must not be trained as text.

The model's pictures always come before the text, so a marker only says that there is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

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
        r"<\|begin_of_image\|>(?:<\|(?:image|endoftext)\|>)*<\|end_of_image\|>",  # GLM-4V
        r"<start_of_image>|<end_of_image>",  # Gemma 3
        r"\[IMG\](?:\[IMG(?:_BREAK)?\])*(?:\[IMG_END\])?",  # Pixtral
        r"<image_placeholder>|<ImageHere>",  # DeepSeek-VL, InternLM-XComposer
    )
)
MARKER = re.compile(_ONE, re.IGNORECASE)
# the marker, with the line break or space that separates it from the text on one side
_WITH_BREAK = re.compile(rf"(?:{_ONE})[ \t]*\n|\n[ \t]*(?:{_ONE})|(?:{_ONE})[ ]?", re.IGNORECASE)
_MEDIUM = r"(?:image|img|picture|photo|video|audio)"
_TAG = re.compile(rf"<[^<>\n]{{0,40}}{_MEDIUM}[^<>\n]{{0,40}}>|\[{_MEDIUM}[^\[\]\n]{{0,20}}\](?!\()", re.IGNORECASE)
# a picture that a text alone points to: a tag of the above, Markdown's, or a file's name
_POINTED = re.compile(
    rf"{_TAG.pattern}|!\[[^\]\n]{{0,200}}\]\([^)\n]{{1,500}}\)|(?<!\S)\S{{1,200}}\.(?:jpe?g|png|webp|bmp|gif|tiff?)(?!\w)",
    re.IGNORECASE,
)


def without_markers(text: str) -> str:
    """Return ``text`` without its markers."""
    return _WITH_BREAK.sub("", text)


def strip_ends(turns: tuple[Turn, ...], images: int, instead: str | None) -> tuple[tuple[Turn, ...], int]:
    """Return ``turns`` without the markers at either end of the questions, as many as there are pictures.

    A question that consists of markers only becomes ``instead``; their number is returned too.

    Raises:
        BadRecordError: ``content``, if there is such a question and nothing instead.
    """
    if not images or not any("<" in turn.question or "[" in turn.question for turn in turns):
        return turns, 0
    stripped = [_strip_turn(turn, number, images, instead) for number, turn in enumerate(turns, start=1)]
    return tuple(turn for turn, _ in stripped), sum(asked for _, asked in stripped)


def _strip_turn(turn: Turn, number: int, images: int, instead: str | None) -> tuple[Turn, bool]:
    text = turn.question
    for _ in range(images):
        matches = _WITH_BREAK.finditer(text)
        found = next((one for one in matches if not text[: one.start()].strip() or not text[one.end() :].strip()), None)
        if found is None:
            break
        text = text[: found.start()] + text[found.end() :]
    if not text.strip():
        if not instead:
            raise BadRecordError("content", tr("question {number} is empty but for its marker", number=number))
        return replace(turn, question=instead), True
    return (turn if text == turn.question else replace(turn, question=text)), False


def left_tag(turns: Sequence[Turn]) -> str | None:
    """Return a tag that looks like a marker in a question, or a marker in an answer, which would be trained as text."""
    for turn in turns:
        for pattern, text in ((_TAG, turn.question), (MARKER, turn.answer)):
            found = pattern.search(text) if "<" in text or "[" in text else None
            if found is not None:
                return found.group()
    return None


def pointed_picture(turns: Sequence[Turn]) -> str | None:
    """Return what in a question of a conversation without a picture points to one."""
    for turn in turns:
        if (found := _POINTED.search(turn.question)) is not None:
            return found.group()
    return None
