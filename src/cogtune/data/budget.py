"""Fits every answer and its history into the token budgets, and counts what did not fit.

``data.max_input_len`` counts the tokens of a prompt's text, ``data.max_output_len`` those of an answer; picture, BOS
and EOS are not counted. A prompt over budget loses its oldest turns of history first and is never cut inside; a
question that alone is too long, and an answer that is too long, are dropped or refused as configured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from cogtune.data.records import Conversation, Example
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.prompt import build_prompt, turn_text

if TYPE_CHECKING:
    from cogtune.configuration.run_config import DataSection
    from cogtune.processing.encode import Encoder

# Number of conversations whose prompts are tokenised in one call.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to train: a turn of a conversation, with the history from turn ``first`` on.

    ``cut`` says that the answer is longer than its budget and is trained up to it, without an end token. ``prompt`` and
    ``answer`` count text tokens, EOS included in ``answer``.
    """

    conversation: int
    turn: int
    first: int
    cut: bool
    prompt: int
    answer: int


@dataclass
class BudgetReport:
    """Counts of what the budgets did. ``trimmed``: answers that are trained without their oldest turns."""

    answers: int = 0
    dropped_long_prompt: int = 0
    dropped_long_answer: int = 0
    truncated_answers: int = 0
    trimmed: int = 0
    trimmed_turns: int = 0

    @property
    def trained(self) -> int:
        """Number of answers that are trained, whole or truncated."""
        return self.answers - self.dropped_long_prompt - self.dropped_long_answer

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FittedExample:
    """The samples of one example, and the text tokens of their prompts, from which shared tokens are counted."""

    index: int
    samples: list[Sample]
    prompts: list[list[int]]


class _Tokenizer(Protocol):
    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any: ...


@dataclass
class _Wanted:
    """One answer on its way to a `Sample`. ``first``: where its history starts; ``tokens``: its prompt."""

    example: int
    number: int
    conversation: Conversation
    turn: int
    earliest: int
    first: int = 0
    tokens: list[int] = field(default_factory=list)


class Budget:
    """Applies the budgets of ``data`` with the tokens and template of ``encoder``; counts go into ``report``."""

    def __init__(self, encoder: Encoder, data: DataSection) -> None:
        self.encoder = encoder
        self.data = data
        self.report = BudgetReport()
        self.seen: Callable[[Conversation, int, int, int], None] | None = None
        """Called for every answer with its conversation, its turn, and the token counts of its fitted prompt and
        answer.
        """

    def fit(self, examples: Sequence[Example]) -> Iterator[FittedExample]:
        """Yield the samples of every example in order; an example may have none left.

        Raises:
            DataError: for a question or an answer over budget, where the configuration says ``error``.
        """
        chunk: list[int] = []
        size = 0
        for index, example in enumerate(examples):
            chunk.append(index)
            size += len(example.conversations)
            if size >= _CHUNK:
                yield from self._fit_chunk(examples, chunk)
                chunk, size = [], 0
        yield from self._fit_chunk(examples, chunk)

    def _fit_chunk(self, examples: Sequence[Example], chunk: list[int]) -> Iterator[FittedExample]:
        wanted = [
            _Wanted(index, number, conversation, turn, self._earliest(turn))
            for index in chunk
            for number, conversation in enumerate(examples[index].conversations)
            for turn in range(len(conversation.turns))
            if conversation.turns[turn].trained
        ]
        if not wanted:
            return
        answers = self._tokens([item.conversation.turns[item.turn].answer for item in wanted])
        self._trim(wanted)
        fitted = {index: FittedExample(index, [], []) for index in chunk}
        for item, answer in zip(wanted, answers, strict=True):
            sample = self._sample(item, len(answer))
            if sample is not None:
                fitted[item.example].samples.append(sample)
                fitted[item.example].prompts.append(item.tokens)
        yield from fitted.values()

    def _earliest(self, turn: int) -> int:
        """Return the first turn of the history if there is room for all of it."""
        return 0 if self.data.turns == "all" else max(0, turn - 1)

    def _trim(self, wanted: list[_Wanted]) -> None:
        """Give every item the longest history that fits: a search over the first turn, for all items in lockstep."""
        limit = self.data.max_input_len
        guesses = self._guesses(wanted)
        searches = [
            (item, longest_history(item.earliest, item.turn, limit, guess))
            for item, guess in zip(wanted, guesses, strict=True)
        ]
        # Each search is a generator that asks for the tokens of one prompt at a time. All pending prompts are tokenised
        # in one batched call per round, which is much faster than one call per prompt.
        for item, search in searches:
            item.first = next(search)
        while searches:
            unsettled = []
            tokens = self._tokens([self._prompt(item) for item, _ in searches])
            for (item, search), ids in zip(searches, tokens, strict=True):
                try:
                    item.first = search.send(ids)
                    unsettled.append((item, search))
                except StopIteration as result:
                    item.first, item.tokens = result.value
            searches = unsettled

    def _guesses(self, wanted: list[_Wanted]) -> list[int]:
        """Return where each item's history about starts, from the token counts of single turns.

        So a search tries two or three prompts near the budget, and not the whole history of each of a thousand turns.
        """
        turns = {(item.example, item.number): item.conversation.turns for item in wanted}
        texts = [turn_text(turn.question, turn.answer, self.encoder.template) for own in turns.values() for turn in own]
        counts = iter(self._tokens(texts))
        ends = {key: list(accumulate((len(next(counts)) for _ in own), initial=0)) for key, own in turns.items()}
        guesses = []
        for item in wanted:
            before = ends[item.example, item.number]
            # the item's own turn counts without its answer; what that is worth decides nothing but the first guess
            room = self.data.max_input_len - (before[item.turn + 1] - before[item.turn])
            first = bisect_left(before, before[item.turn] - max(room, 0), 0, item.turn)
            guesses.append(max(item.earliest, first))
        return guesses

    def _sample(self, item: _Wanted, answer: int) -> Sample | None:
        data, report = self.data, self.report
        report.answers += 1
        if self.seen is not None:
            self.seen(item.conversation, item.turn, len(item.tokens), answer)
        if len(item.tokens) > data.max_input_len:
            if data.long_prompt == "error":
                raise self._too_long(item, "question", len(item.tokens), "max_input_len", data.max_input_len)
            report.dropped_long_prompt += 1
            return None
        cut = answer > data.max_output_len
        if cut and data.long_answer == "error":
            raise self._too_long(item, "answer", answer, "max_output_len", data.max_output_len)
        if cut and data.long_answer == "drop":
            report.dropped_long_answer += 1
            return None
        report.truncated_answers += cut
        lost = item.first - item.earliest
        report.trimmed += lost > 0
        report.trimmed_turns += lost
        length = data.max_output_len if cut else answer + 1
        return Sample(item.number, item.turn, item.first, cut, len(item.tokens), length)

    def _too_long(self, item: _Wanted, part: str, found: int, key: str, limit: int) -> DataError:
        where = tr(
            "{source}: the {part} of turn {turn}", source=item.conversation.source, part=part, turn=item.turn + 1
        )
        policy = "long_prompt" if part == "question" else "long_answer"
        others = "drop" if part == "question" else tr("drop or truncate")
        return DataError(
            tr("{where} has {found} tokens, data.{key} allows {limit}", where=where, found=found, key=key, limit=limit),
            hint=tr("raise data.{key}, or set data.{policy} to {others}", key=key, policy=policy, others=others),
            code="data-too-long",
        )

    def _prompt(self, item: _Wanted) -> str:
        turns = item.conversation.turns
        history = [(turn.question, turn.answer) for turn in turns[item.first : item.turn]]
        return build_prompt(turns[item.turn].question, history, self.encoder.template)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        tokenizer: _Tokenizer = self.encoder.tokenizer
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def longest_history(
    earliest: int, turn: int, limit: int, guess: int | None = None
) -> Generator[int, list[int], tuple[int, list[int]]]:
    """Find the smallest first turn of history, from ``earliest`` on, with which the prompt of ``turn`` fits ``limit``.

    Yields a first turn to try and expects the tokens of that prompt. Returns the first turn and its tokens; if nothing
    fits, the first turn is ``turn`` (no history). Dropping turns never lengthens a prompt, so a search in steps of 1,
    2, 4, ... from ``guess``, and a binary search after it, find it.
    """
    low, high = earliest, turn
    # invariant: with history from ``high`` on the prompt fits, or ``high`` is ``turn`` and was not tried
    best: list[int] | None = None
    middle, step = earliest if guess is None else max(earliest, min(guess, turn - 1)), 1
    while low < high:
        tokens = yield middle
        if len(tokens) <= limit:
            high, best = middle, tokens
            middle = high - step
        else:
            low = middle + 1
            middle = low + step - 1
        step *= 2
        if not low <= middle < high:
            middle = (low + high) // 2
    if best is None:
        best = yield high
    return high, best
