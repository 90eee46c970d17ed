"""What the page asks of the models: answers of several sides at once, piece by piece, and scores of closed questions.

A side is the base model or one of the adapters beside it. All sides share one engine, so their answers are computed
together, each with a history of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.errors import InputError, RunError
from cogtune.generate.choices import ChoiceScores, ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.stream import Answer
from cogtune.language import tr

_WAIT = 0.1
"""Seconds between looks at whether the answer was stopped."""
Piece = str | BaseException | None


@dataclass
class Turn:
    """A question, and what each side answered."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)


def history_of(turns: Sequence[Turn], side: str) -> list[tuple[str, str]]:
    """Return the conversation as a side knows it: its own answers, and those of others where it was not asked."""
    found = []
    for turn in turns:
        answer = turn.answers.get(side) or next((text for text in turn.answers.values() if text), "")
        if answer:
            found.append((turn.question, answer))
    return found


def stream(
    sides: Mapping[str, Generator],
    shown: Path | None,
    turns: Sequence[Turn],
    question: str,
    decoding: Decoding,
    seed: int,
    stopped: threading.Event,
    seconds: float,
) -> Iterator[dict[str, str]]:
    """Yield the text of each side so far, until all have ended, ``stopped`` is set, or the time is up.

    Args:
        shown: file of a picture or clip; None: a conversation about none.
        turns: the conversation before ``question``.
        seed: of the draws, the same for all sides.
        seconds: time for the whole answer.

    Raises:
        InputError: an empty question, a file that cannot be read, or too many tokens. OutOfMemoryError, RunError: an
            answer could not be computed, or the time was up.
    """
    if not question.strip():
        raise InputError(tr("the question is empty"), hint=tr("write one below the conversation"))
    pieces: queue.SimpleQueue[tuple[str, Piece]] = queue.SimpleQueue()
    answers: dict[str, Answer] = {}
    texts = dict.fromkeys(sides, "")
    deadline = time.monotonic() + seconds
    try:
        for side, generator in sides.items():
            answers[side] = generator.submit((shown, question, history_of(turns, side)), decoding, seed)
            threading.Thread(target=_forward, args=(side, answers[side], pieces), daemon=True).start()
        running = set(answers)
        while running and not stopped.is_set():
            if time.monotonic() > deadline:
                raise RunError(tr("no whole answer within {seconds:g} seconds", seconds=seconds))
            changed = _take(pieces, texts, running)
            if changed:
                yield dict(texts)
    finally:
        for answer in answers.values():
            answer.stop()
    while not pieces.empty():  # what came before the end
        _take(pieces, texts, running)
    yield dict(texts)


def _forward(side: str, answer: Answer, pieces: queue.SimpleQueue[tuple[str, Piece]]) -> None:
    try:
        for piece in answer:
            pieces.put((side, piece))
    except BaseException as error:  # raised where the page waits
        pieces.put((side, error))
    pieces.put((side, None))


def _take(pieces: queue.SimpleQueue[tuple[str, Piece]], texts: dict[str, str], running: set[str]) -> bool:
    """Add what has come; return whether anything has."""
    changed = False
    while True:
        try:
            side, piece = pieces.get(timeout=0 if changed else _WAIT)
        except queue.Empty:
            return changed
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            running.discard(side)
        else:
            texts[side] += piece
        changed = True
        if not running:
            return changed


def closed_questions(questions: str, choices: str) -> list[ClosedQuestion]:
    """Parse questions, one a line, and the choices of all of them, joined by commas.

    Raises:
        InputError: no question, or fewer than two different choices.
    """
    asked = [line.strip() for line in questions.splitlines() if line.strip()]
    named = tuple(dict.fromkeys(name.strip() for name in choices.replace("，", ",").split(",") if name.strip()))
    if not asked:
        raise InputError(tr("no question is given"), hint=tr("write one a line"))
    if len(named) < 2:
        raise InputError(tr("at least two different answers are needed"), hint=tr("join them by commas: yes, no"))
    return [ClosedQuestion(question, named) for question in asked]


def score(
    sides: Mapping[str, Generator], shown: Path | None, questions: Sequence[ClosedQuestion]
) -> dict[str, list[ChoiceScores]]:
    """Return each side's scores of closed questions.

    Raises:
        InputError: a file that cannot be read, or too many tokens. OutOfMemoryError: too little memory.
    """
    return {side: generator.score(shown, questions) for side, generator in sides.items()}
