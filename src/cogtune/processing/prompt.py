"""The text around a question: the three published templates.

There is no system prompt, no token between turns, and no space after the last ``Answer:``, because an answer is
tokenised separately. Text-only questions use the same templates.
"""

from __future__ import annotations

from collections.abc import Sequence

from cogtune.errors import InputError
from cogtune.language import tr

TEMPLATES = ("chat", "vqa", "base")

_ANSWER_WORD = {"chat": "Answer:", "vqa": "Short answer:"}

Turns = Sequence[tuple[str, str]]


def check_template(template: str) -> str:
    """Return ``template`` if it is one of `TEMPLATES`, else raise InputError with their names."""
    if template not in TEMPLATES:
        raise InputError(
            tr(
                "{template!r} is not a template; there are {templates}",
                template=template,
                templates=", ".join(TEMPLATES),
            ),
            hint=tr("leave it out to use the checkpoint's own (template_version in its config.json)"),
            code="template",
        )
    return template


def build_prompt(query: str, history: Turns = (), template: str = "chat") -> str:
    """Return the text after BOS and the images, up to where the answer starts.

    Args:
        history: earlier (question, answer) pairs, oldest first. Template ``base`` has no room for them.

    Raises:
        InputError: an unknown template, a history that is not pairs of text, a query that is not text.
    """
    check_template(template)
    if not isinstance(query, str):
        raise InputError(
            tr("the query is {name}, not text", name=type(query).__name__),
            hint=tr('pass query="..."; an empty text is allowed'),
        )
    _check_history(history)
    if template == "base":
        return query
    word = _ANSWER_WORD[template]
    past = "".join(turn_text(question, answer, template) for question, answer in history)
    return f"{past}Question: {query} {word}"


def answer_word(template: str) -> str | None:
    """Return the words that ask for the answer, at the end of the prompt; None in template ``base``."""
    return _ANSWER_WORD.get(check_template(template))


def turn_text(question: str, answer: str, template: str) -> str:
    """Return the text of one turn of a history."""
    return f"Question: {question} {_ANSWER_WORD.get(template, '')} {answer}\n"


def image_text(number: int, template: str = "chat") -> str:
    """Return the text after image ``number`` (from 0), for a model with numbered images.

    Only template ``chat`` has one. It is tokenised separately.
    """
    return str(number) if check_template(template) == "chat" else ""


def _check_history(history: Turns) -> None:
    for number, turn in enumerate(history, start=1):
        pair = isinstance(turn, (tuple, list)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        if not pair:
            raise InputError(
                tr(
                    "history item {number} is {turn!r:.80}, not a (question, answer) pair of texts",
                    number=number,
                    turn=turn,
                ),
                hint=tr('pass history=[("first question", "its answer"), ...]'),
            )
