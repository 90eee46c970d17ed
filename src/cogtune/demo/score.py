"""Scores a model on the demo's test questions: exact answers, counted by kind of question.

Answers come from the ordinary generation engine in large batches. An extra word makes an answer wrong, so no more
tokens are generated than the longest right answer has, end token included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from cogtune.demo.easyvqa import VqaPicture
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask, Generator
from cogtune.language import phrase
from cogtune.processing.image import read_image

BATCH, SLOTS = 512, 64
_FREQUENT = phrase("most frequent answer to each question")
KINDS = (phrase("yes or no"), phrase("shape"), phrase("colour"))


@dataclass(frozen=True)
class Score:
    """Answers of one measurement in question order, and the number of right ones, in total and by kind."""

    answers: tuple[str, ...]
    right: int
    total: int
    by_kind: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        kinds = {kind: {"right": right, "total": total, "accuracy": right / total}
                 for kind, (right, total) in self.by_kind.items()}  # fmt: skip
        return {"accuracy": self.accuracy, "right": self.right, "total": self.total, "by_kind": kinds}


def kind_of(question: str, answer: str) -> str:
    """Return the kind of a question."""
    if answer in ("yes", "no"):
        return KINDS[0]
    return KINDS[2] if "color" in question else KINDS[1]


def score(answers: Sequence[str], pictures: Sequence[VqaPicture]) -> Score:
    """Compare answers with references exactly."""
    asked = [(question, reference) for picture in pictures for question, reference in picture.questions]
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for answer, (question, reference) in zip(answers, asked, strict=True):
        kind = kind_of(question, reference)
        total[kind] += 1
        right[kind] += answer == reference
    by_kind = {kind: (right[kind], total[kind]) for kind in KINDS if total[kind]}
    return Score(tuple(answers), right.total(), total.total(), by_kind)


def measure(generator: Generator, pictures: Sequence[VqaPicture], *, blank: bool = False) -> Score:
    """Ask every question about every picture; ``blank``: replace every picture by a white one."""
    white = Image.new("RGB", (generator.processor.image_size,) * 2, "white")
    asks: list[Ask] = []
    for picture in pictures:
        image = white if blank else read_image(picture.file)
        asks += [(image, question, ()) for question, _ in picture.questions]
    decoding = Decoding(max_new_tokens=_longest(generator, pictures) + 1)
    # equal questions about equal pictures have equal answers, and blank pictures are all equal
    distinct = list({(id(ask[0]), ask[1]): ask for ask in asks}.values())
    answers: dict[tuple[int, str], str] = {}
    generator.slots = SLOTS  # this model's slots are small, and a step of 64 rows costs little more than one of 8
    with _one_thread():
        for start in range(0, len(distinct), BATCH):
            some = distinct[start : start + BATCH]
            for (shown, question, _), answer in zip(some, generator.answer_batch(some, decoding), strict=True):
                answers[id(shown), question] = answer
    return score([answers[id(shown), question] for shown, question, _ in asks], pictures)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread: sharing this model's small products costs more than it gains (docs/log.md)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _longest(generator: Generator, pictures: Iterable[VqaPicture]) -> int:
    references = {answer for picture in pictures for _, answer in picture.questions}
    return max(len(generator.processor.encoder.answer_ids(answer)) for answer in references)


def without_pictures(train: Sequence[VqaPicture], test: Sequence[VqaPicture]) -> dict[str, Score]:
    """Return the scores of two baselines without pictures, from the training answers: the most frequent answer, and the
    most frequent answer to each question's text.
    """
    everything: Counter[str] = Counter()
    by_text: dict[str, Counter[str]] = {}
    for picture in train:
        for question, answer in picture.questions:
            everything[answer] += 1
            by_text.setdefault(question, Counter())[answer] += 1
    top = everything.most_common(1)[0][0]
    asked = [question for picture in test for question, _ in picture.questions]
    texts = [by_text[question].most_common(1)[0][0] if question in by_text else top for question in asked]
    return {f"always “{top}”": score([top] * len(asked), test),
            _FREQUENT: score(texts, test)}  # fmt: skip
