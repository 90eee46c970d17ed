"""Group samples into rows: all samples of an example, or as many as ``data.max_row_tokens`` allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cogtune.data.budget import FittedExample, Sample
from cogtune.data.records import Example
from cogtune.processing.encode import Encoded, Encoder


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row: samples of one example, and its length in tokens (BOS and images included).

    With ``data.turns: one_random`` it holds every round that can be drawn, and ``tokens`` is the largest possible
    length.
    """

    example: int
    samples: tuple[Sample, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class RowShape:
    """Size of a row: images, tokens, labelled tokens, and trained answers."""

    images: int
    tokens: int
    labelled: int
    answers: int


def shape_of(plan: RowPlan, *, images: int, one_random: bool) -> RowShape:
    """Return the shape of a planned row; if one of several rounds is drawn, of the longest."""
    rounds: dict[int, list[int]] = {}
    for sample in plan.samples:
        rounds.setdefault(sample.conversation, []).append(sample.answer)
    labelled = sum(max(answers) if one_random else sum(answers) for answers in rounds.values())
    return RowShape(images, plan.tokens, labelled, len(rounds) if one_random else len(plan.samples))


def encode_sample(encoder: Encoder, example: Example, sample: Sample, max_output_len: int) -> Encoded:
    """Return the tokens of one sample of ``example``, as trained."""
    turns = example.conversations[sample.conversation].turns
    turn = turns[sample.turn]
    history = [(past.question, past.answer) for past in turns[sample.first : sample.turn]]
    encoded = encoder.encode(turn.question, history, answer=turn.answer, images=len(example.images))
    if not sample.cut:
        return encoded
    end = encoded.prompt_len + max_output_len
    return Encoded(encoded.input_ids[:end], encoded.token_type_ids[:end], encoded.labels[:end], encoded.prompt_len)


def plan_rows(fitted: FittedExample, *, head: int, limit: int | None, one_random: bool) -> list[RowPlan]:
    """Return the rows of one example, in the order of its samples; none if it has no sample.

    Args:
        head: tokens before the text (BOS, images and the texts after them), shared by all samples of a row.
        limit: most tokens of a row. A single sample longer than that still gets a row (the caller refuses it).
    """
    rows: list[RowPlan] = []
    samples: list[Sample] = []
    shared, tokens = SharedPrefixes(), head
    for unit in _conversations(fitted) if one_random else _single_samples(fitted):
        added = unit.tokens_beside(shared)
        if samples and limit is not None and tokens + added > limit:
            rows.append(RowPlan(fitted.index, tuple(samples), tokens))
            samples, shared, tokens = [], SharedPrefixes(), head
            added = unit.tokens_beside(shared)
        if unit.prompt is not None:
            shared.add(unit.prompt)
        samples += unit.samples
        tokens += added
    if samples:
        rows.append(RowPlan(fitted.index, tuple(samples), tokens))
    return rows


@dataclass(frozen=True, slots=True)
class _Unit:
    """Samples that stay in one row.

    ``prompt``: the tokens of a single sample; None: one of several is drawn per epoch.
    """

    samples: list[Sample]
    prompt: list[int] | None

    def tokens_beside(self, shared: SharedPrefixes) -> int:
        """Return how many tokens this adds to a row that has ``shared``; for a drawn unit, the largest number."""
        if self.prompt is None:
            return max(sample.prompt + sample.answer for sample in self.samples)
        return shared.added(self.prompt) + self.samples[0].answer


def _single_samples(fitted: FittedExample) -> list[_Unit]:
    return [_Unit([sample], prompt) for sample, prompt in zip(fitted.samples, fitted.prompts, strict=True)]


def _conversations(fitted: FittedExample) -> list[_Unit]:
    groups = groupby(fitted.samples, key=lambda sample: sample.conversation)
    return [_Unit(list(samples), None) for _, samples in groups]


class SharedPrefixes:
    """Counts the tokens of a set of prompts if equal prefixes are stored once."""

    def __init__(self) -> None:
        self._sorted: list[list[int]] = []

    def added(self, prompt: list[int]) -> int:
        """Return how many tokens ``prompt`` adds: those after its longest common prefix with an earlier prompt.

        In sorted order, the longest common prefix is with one of the two neighbours.
        """
        place = bisect_left(self._sorted, prompt)
        neighbours = self._sorted[max(0, place - 1) : place + 1]
        return len(prompt) - max((common_prefix(prompt, other) for other in neighbours), default=0)

    def add(self, prompt: list[int]) -> None:
        self._sorted.insert(bisect_left(self._sorted, prompt), prompt)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
