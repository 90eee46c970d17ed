"""Conversations as lists of messages: read for the encoder, and the same rules as a Jinja chat template.

A message is ``{"role": "user", "content": ...}``; the content is a text, or a list of parts of type ``text`` and
``image``. A system text stands before the first question, on a line of its own. Messages of the user that follow one
another are one question. Images stand at the beginning, whichever message shows them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.prompt import answer_word

_PICTURE_KEYS = ("image", "url", "path", "image_url")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """A question with what came before it.

    Attributes:
        question, history: as for `cogtune.processing.encode.Encoder.encode`.
        images: PIL images or paths, in order; None for each image part without a picture.
        answer: of the assistant to ``question``, if the conversation ends with it.
    """

    question: str
    history: tuple[tuple[str, str], ...]
    images: tuple[Any, ...]
    answer: str | None


def read_conversation(messages: Any) -> Conversation:
    """Read a list of messages.

    Raises:
        InputError: not messages of text and images, or not in turns.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(tr("a conversation is a list of at least one message"), code="conversation")
    turns = [_message(number, message) for number, message in enumerate(messages)]
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    merged: list[tuple[str, str, list[Any]]] = []
    for role, text, images in turns:
        if merged and role == merged[-1][0] == "user":
            _, before, shown = merged.pop()
            text, images = "\n".join(part for part in (before, text) if part), shown + images
        merged.append((role, text, images))
    wanted = ["user" if place % 2 == 0 else "assistant" for place in range(len(merged))]
    if not merged or [role for role, _, _ in merged] != wanted:
        raise InputError(
            tr(
                "the messages of a conversation are not in turns: {roles}",
                roles=", ".join(role for role, _, _ in turns),
            ),
            hint=tr("a system message at most at the beginning, then user and assistant by turns, the user first"),
            code="conversation",
        )
    texts = [text for _, text, _ in merged]
    if system:
        texts[0] = f"{system}\n{texts[0]}"
    answer = texts.pop() if len(texts) % 2 == 0 else None
    history = tuple(zip(texts[0:-1:2], texts[1:-1:2], strict=True))
    return Conversation(texts[-1], history, tuple(image for _, _, shown in merged for image in shown), answer)


def _message(number: int, message: Any) -> tuple[str, str, list[Any]]:
    """Return a message's role, text and images."""
    fields = message if isinstance(message, Mapping) else {}
    role, content = _ROLES.get(fields.get("role", "")), fields.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    others = [name for name, value in fields.items() if value and name not in ("role", "content", "name")]
    if role is None or others or not isinstance(parts, (list, tuple)):
        raise InputError(
            tr("message {number} is {message:.120}", number=number, message=repr(message)),
            hint=tr('a message is {"role": "system", "user" or "assistant", "content": a text or a list of parts}'),
            code="conversation",
        )
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url") and role == "user":
            images.append(_picture(part))
        else:
            raise InputError(
                tr("message {number} has the part {part:.120}", number=number, part=repr(part)),
                hint=tr("the user's parts are texts and images, the others' are texts"),
                code="conversation",
            )
    return role, "\n".join(texts), images


def _picture(part: Mapping[str, Any]) -> Any:
    """Return the PIL image or path of an image part, or None."""
    if "base64" in part:
        raise InputError(
            tr("the picture of a message is base64, which is not read here"),
            hint=tr('give a PIL image or a path: {"type": "image", "image": ...}'),
            code="conversation",
        )
    found = next((part[key] for key in _PICTURE_KEYS if part.get(key) is not None), None)
    return found.get("url") if isinstance(found, Mapping) else found


def chat_template(
    template: str, *, bos: str, image: str, image_tokens: int, max_images: int, numbered_images: bool
) -> str:
    """Return the rules of `read_conversation` and a template of `cogtune.processing.prompt` as Jinja.

    What it renders starts with BOS and holds each image's placeholders, so a tokenizer that adds no special tokens
    makes the encoder's tokens of it. The variable ``image_tokens`` changes the number of placeholders of an image. An
    answer at the end is refused: as a target it is tokenised apart from its prompt, which one text cannot express.

    Args:
        template: ``chat``, ``vqa`` or ``base``.
        bos, image: the tokens' texts.
        image_tokens, max_images, numbered_images: as for `cogtune.processing.encode.Encoder`.
    """
    values = {
        "WORD": json.dumps(answer_word(template)).replace("null", "none"),
        "NUMBERED": json.dumps(numbered_images and template == "chat"),
        "MOST_IMAGES": str(max_images) if max_images < sys.maxsize else "none",
        "IMAGE_TOKENS": str(image_tokens),
        "BOS": json.dumps(bos, ensure_ascii=False),
        "IMAGE": json.dumps(image, ensure_ascii=False),
    }
    found = resources.files("cogtune.processing").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    for name, value in values.items():
        found = found.replace(f"<<{name}>>", value)
    return found
