"""Answers of closed questions: of given choices, the one whose tokens are likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cogtune.data.pixels import tower_inputs
from cogtune.data.records import ImageRef, Question
from cogtune.errors import ConfigError
from cogtune.evaluate.questions import Asked, number
from cogtune.evaluate.text import normalise
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.generator import Generator
from cogtune.generate.predict import OnProgress
from cogtune.generate.predictions_file import PredictionFile
from cogtune.language import tr
from cogtune.processing.frames import Frame

_AT_ONCE = 16  # questions about the same pictures in one forward pass


def closed(asked: Asked, choices: Sequence[str]) -> Asked:
    """Return the questions whose right answers are all among the choices.

    Raises:
        ConfigError: fewer than two different choices, or none of the questions is one of them.
    """
    known = {normalise(choice) for choice in choices}
    if len(known) < 2:
        raise ConfigError(
            tr("--choices {choices}: at least two different ones were expected", choices=",".join(choices)),
            hint=tr("for example --choices yes,no"),
            code="config-value",
        )
    kept = [one for one in asked.questions if all(normalise(right) in known for right in one.references)]
    if not kept:
        raise ConfigError(
            tr("no right answer of the data is one of {choices}", choices=tr(", ").join(choices)),
            hint=tr("name the answers as the data writes them; without --choices answers are generated"),
            code="config-value",
        )
    left = {(one.id, one.turn) for one in asked.questions} - {(one.id, one.turn) for one in kept}
    found = number(kept)
    return replace(asked, questions=found.questions, pictures=found.pictures, aside=asked.aside | left)


def answer_by_choice(
    generator: Generator, questions: Sequence[Question], file: PredictionFile, choices: Sequence[str], told: OnProgress
) -> dict[int, str]:
    """Append the likeliest choice for each question that ``file`` does not have; return all by position.

    Questions about the same pictures share a forward pass.
    """
    answers = dict(file.done)
    with file:
        while file.next < len(questions):
            start = file.next
            end = start + 1
            while end < min(len(questions), start + _AT_ONCE) and questions[end].images == questions[start].images:
                end += 1
            asked = [ClosedQuestion(one.question, tuple(choices), one.history) for one in questions[start:end]]
            images = _shown(questions[start].images, generator.processor.image_size)
            for question, scores in zip(questions[start:end], generator.score(images, asked), strict=True):
                answers[file.next] = scores.best
                file.append(question, scores.best)
                file.next += 1
            told(file.next, len(questions))
        file.finish()
    return answers


def _shown(images: Sequence[ImageRef], side: int) -> list[Any]:
    """Return images as a generator takes them: files, and a clip's frames as its inputs."""
    clip = any(isinstance(image, Frame) for image in images)
    return list(tower_inputs(images, side)) if clip else list(images)
