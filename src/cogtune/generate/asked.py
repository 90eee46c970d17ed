"""The questions of a prediction: which are asked, the longest of them, and which closed ones share a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cogtune.configuration.answer_config import AnswerConfig
from cogtune.data.records import Example, Question, iter_questions
from cogtune.processing.token_file import find_token_file

_TREE = 64
"""Most closed questions of one forward pass."""


def iter_asked(examples: Iterable[Example], question: str | None) -> Iterator[Question]:
    """Yield every question of the data, or with ``question`` that one about each example's images, once.

    The conversations' first answers are then the references.
    """
    if question is None:
        yield from iter_questions(examples)
        return
    for example in examples:
        first = example.conversations[0]
        if example.images:
            answers = [talk.turns[0].answer for talk in example.conversations if talk.turns[0].answer]
            right = tuple(dict.fromkeys(answers))
            closed = first.turns[0].choices
            yield Question(first.id, 0, example.images, question, next(iter(right), None), (), right, closed)


def longest(questions: Iterable[Question], model: str, config: AnswerConfig, max_new_tokens: int) -> int | None:
    """Return the tokens of the longest prompt with its images and an answer, which memory is planned for.

    The longest is that with the most characters; a history that does not fit is cut later. None: no question.
    """
    encoder = find_token_file(model, config.model.template, config.model.tokenizer).encoder()

    def letters(asked: Question) -> int:
        return len(asked.question) + sum(len(text) for turn in asked.history for text in turn)

    most, images = None, 0
    for asked in questions:
        images = max(images, len(asked.images))
        most = asked if most is None or letters(asked) > letters(most) else most
    if most is None:
        return None
    prompt = len(encoder.prompt_ids(most.question, most.history))
    limit = config.generate.max_input_len
    return encoder.head_tokens(images) + (prompt if limit is None else min(prompt, limit)) + max_new_tokens


def trees(questions: Sequence[Question], *, own_history: bool) -> dict[int, tuple[int, ...]]:
    """Return for each closed question, by position, those that are scored in the same forward pass.

    They are about the same images and stand together; with ``own_history`` they are of the same turn.
    """
    runs: dict[tuple[int, int], list[int]] = {}
    run = -1
    for place, question in enumerate(questions):
        if place == 0 or question.images != questions[place - 1].images or not question.images:
            run = place
        if question.choices:
            runs.setdefault((run, question.turn if own_history else 0), []).append(place)
    chunks = [tuple(places[at : at + _TREE]) for places in runs.values() for at in range(0, len(places), _TREE)]
    return {place: chunk for chunk in chunks for place in chunk}
