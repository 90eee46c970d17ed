"""Rows for training: planned once from token counts, and built from text and images when a worker asks for one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from cogtune.configuration.shapes import IGNORED_LABEL, TREE_ROOT
from cogtune.data.budget import Budget, BudgetReport, Sample
from cogtune.data.pixels import tower_inputs
from cogtune.data.records import Example, ImageRef, Question, next_images
from cogtune.data.rows import RowPlan, RowShape, encode_sample, plan_rows, shape_of
from cogtune.errors import ConfigError, DataError
from cogtune.language import phrase, tr
from cogtune.processing.encode import Encoded, Encoder
from cogtune.processing.tree import Row, build_tree

if TYPE_CHECKING:
    from cogtune.configuration.run_config import DataSection

_MOST_IN_PLACE = 32
"""Rows in a row that are tried in place of one whose images cannot be decoded."""

RowIndex = tuple[int, int]
Features = Callable[[ImageRef], torch.Tensor]
"""Returns an image's features [Q, W]: the output of the vision tower."""


@dataclass(frozen=True)
class RowSample:
    """One row of a batch; ``record_ids`` are its conversations' ids.

    Its images, in their order, are either ``pixel_values``, each float32 [3, S, S], or ``image_features``, each [Q, W]:
    the vision tower's output for them.
    """

    row: Row
    pixel_values: tuple[torch.Tensor, ...]
    record_ids: tuple[str, ...]
    image_features: tuple[torch.Tensor, ...] = ()
    skipped: tuple[str, ...] = ()
    """What was wrong with the images of rows in whose place this one stands."""


@dataclass(frozen=True)
class RowsReport:
    """Counts of the planned rows: the budgets' counts, and lengths in tokens (BOS and images included)."""

    budget: BudgetReport
    rows: int
    tokens: int
    longest_row: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {name: getattr(self, name) for name in ("rows", "tokens", "longest_row", "fingerprint")}
        return {**self.budget.to_dict(), "trained_answers": self.budget.trained, **own}

    def lines(self) -> list[str]:
        """Return a few sentences for the console."""
        budget = self.budget
        lines = [
            tr(
                "{trained} answers in {rows} row{s}, {tokens} tokens, longest row {longest_row}",
                trained=budget.trained,
                rows=self.rows,
                s="" if self.rows == 1 else "s",
                tokens=self.tokens,
                longest_row=self.longest_row,
            )
        ]
        counts = {
            phrase("{count} questions longer than data.max_input_len dropped"): budget.dropped_long_prompt,
            phrase("{count} answers longer than data.max_output_len dropped"): budget.dropped_long_answer,
            phrase("{count} answers truncated to data.max_output_len, without an end token"): budget.truncated_answers,
            phrase("{count} answers trained without their oldest turns"): budget.trimmed,
        }
        return lines + [tr(what, count=count) for what, count in counts.items() if count]


class TrainRows(Dataset[RowSample]):
    """Rows of ``examples``, indexed by ``(epoch, row)``, by a row number for the first epoch, or by None for a filler
    row.

    A filler row is BOS without a label. Every other row has at least one label. Planning tokenises every text once and
    keeps counts only.

    Args:
        image_size: side of the square that images are resized to, in pixels.
        seed: seeds the draws of ``data.turns: one_random``.
        required: raise if no row is left; False for validation data.

    Raises:
        DataError: for a text over budget if ``data`` says ``error``, or if no row is left.
        ConfigError: if ``data.max_row_tokens`` is too small for one sample.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: Encoder,
        data: DataSection,
        image_size: int,
        *,
        seed: int = 0,
        required: bool = True,
    ) -> None:
        self._examples = list(examples)
        self._encoder = encoder
        self._data = data
        self._image_size = image_size
        self._seed = seed
        self._required = required
        self._features: Features | None = None
        budget = Budget(encoder, data)
        self._plans: list[RowPlan] = []
        for fitted in budget.fit(self._examples):
            head = encoder.head_tokens(len(self._examples[fitted.index].images))
            self._plans += plan_rows(
                fitted, head=head, limit=data.max_row_tokens, one_random=data.turns == "one_random"
            )
        self._refuse_long_rows()
        self.report = RowsReport(
            budget=budget.report,
            rows=len(self._plans),
            tokens=sum(plan.tokens for plan in self._plans),
            longest_row=max((plan.tokens for plan in self._plans), default=0),
            fingerprint=self._fingerprint(),
        )
        if required and not self._plans:
            raise DataError(
                tr(
                    "nothing to train on: none of {answers} answers fits (too long: {dropped_long_prompt}"
                    " questions, {dropped_long_answer} answers)",
                    answers=budget.report.answers,
                    dropped_long_prompt=budget.report.dropped_long_prompt,
                    dropped_long_answer=budget.report.dropped_long_answer,
                ),
                hint=tr("raise data.max_input_len and data.max_output_len"),
                code="data-nothing-left",
            )

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def vision_experts(self) -> bool:
        """Whether the rows' model has experts to sort tokens by; a video model, which numbers its images, has one."""
        return not self._encoder.numbered_images

    @property
    def images(self) -> list[tuple[ImageRef, ...]]:
        """The images of each row, in order."""
        return [self._examples[plan.example].images for plan in self._plans]

    def questions(self) -> list[Question]:
        """Return the planned answers as questions, each with the history that it is trained with."""
        found: dict[tuple[str, int], Question] = {}
        for plan in self._plans:
            example = self._examples[plan.example]
            for sample in plan.samples:
                conversation = example.conversations[sample.conversation]
                turn = conversation.turns[sample.turn]
                history = tuple((past.question, past.answer) for past in conversation.turns[sample.first : sample.turn])
                right = turn.references or (turn.answer,)
                asked = (conversation.id, sample.turn, example.images, turn.question, turn.answer, history, right)
                found.setdefault((conversation.id, sample.turn), Question(*asked))
        return list(found.values())

    def prompt(self, question: Question) -> Encoded:
        """Return a question's tokens without an answer, as trained."""
        return self._encoder.encode(question.question, question.history, images=len(question.images))

    def empty_prompt(self) -> Encoded:
        """Return a prompt that asks nothing: BOS alone."""
        return Encoded([self._encoder.bos_id], [0], [IGNORED_LABEL], 1)

    def pictures(self, images: Sequence[ImageRef]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the pictures' pixels, each [3, S, S], or their features, each [Q, W]; the other list is empty."""
        if self._features is None:
            return list(self._pixels(images)), []
        return [], [self._features(image) for image in images]

    def is_left_out(self, images: Sequence[ImageRef]) -> bool:
        """Return whether ``data.on_bad: skip`` leaves these images out, because one of them cannot be decoded."""
        if self._data.on_bad != "skip":
            return False
        try:
            self.pictures(images)
        except DataError as error:
            return error.code.startswith(("image-", "clip-"))
        return False

    def use_features(self, features: Features | None) -> None:
        """From now on, take images' features from ``features``; no image file is decoded."""
        self._features = features

    def exchanged(self, most: int) -> tuple[TrainRows, TrainRows]:
        """Return up to ``most`` rows with images, at even distances, and the same rows about other rows' images.

        Rows that have no partner with as many images are left out. Call it after `use_features`.
        """
        shown = [plan for plan in self._plans if self._examples[plan.example].images]
        chosen = shown if len(shown) <= most else [shown[at * len(shown) // most] for at in range(most)]
        images = next_images(self._examples[plan.example].images for plan in chosen)
        chosen = [plan for plan in chosen if images[(own := self._examples[plan.example].images)] != own]
        rows, others = copy.copy(self), copy.copy(self)
        rows._plans = others._plans = chosen
        others._examples = [replace(one, images=images.get(one.images, one.images)) for one in self._examples]
        return rows, others

    @property
    def weights(self) -> list[float]:
        """Return how often an epoch shows each row."""
        return [self._examples[plan.example].weight for plan in self._plans]

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each row; with ``one_random``, the most it can have."""
        return [plan.tokens for plan in self._plans]

    @property
    def shapes(self) -> list[RowShape]:
        """Return the shape of each row, to predict memory and time."""
        one_random = self._data.turns == "one_random"
        return [
            shape_of(plan, images=len(self._examples[plan.example].images), one_random=one_random)
            for plan in self._plans
        ]

    def __getitem__(self, index: RowIndex | int | None) -> RowSample:
        if index is None:
            return self.filler()
        return self.row(0, index) if isinstance(index, int) else self.row(*index)

    def filler(self) -> RowSample:
        """Return a row that adds 0 to the loss and 0 to the token count."""
        bos = self._encoder.bos_id
        empty = Row([bos], token_type_ids=[0], labels=[IGNORED_LABEL], segment_ids=[0], segment_parents=[TREE_ROOT])
        return RowSample(empty, (), ())

    def row(self, epoch: int, index: int) -> RowSample:
        """Build one row. The epoch matters only for ``data.turns: one_random``.

        With ``data.on_bad: skip``, a row whose images cannot be decoded is replaced by the next one in training, and
        by a filler in validation.

        Raises:
            DataError: an image cannot be decoded.
            CogtuneError: features cannot be read.
        """
        skipped: list[str] = []
        while True:
            try:
                row = self._row(epoch, (index + len(skipped)) % len(self._plans))
            except DataError as error:
                wrong = error.code.startswith(("image-", "clip-")) and self._data.on_bad == "skip"
                if not wrong or len(skipped) == min(_MOST_IN_PLACE, len(self._plans)):
                    raise
                skipped.append(error.message)
                if not self._required:
                    return replace(self.filler(), skipped=tuple(skipped))
            else:
                return replace(row, skipped=tuple(skipped)) if skipped else row

    def _row(self, epoch: int, index: int) -> RowSample:
        plan = self._plans[index]
        example = self._examples[plan.example]
        samples = plan.samples if self._data.turns == "all" else self._drawn(example, plan, epoch)
        longest = self._data.max_output_len
        row = build_tree([encode_sample(self._encoder, example, sample, longest) for sample in samples])
        ids = dict.fromkeys(example.conversations[sample.conversation].id for sample in samples)
        if self._features is None:
            return RowSample(row, self._pixels(example.images), tuple(ids))
        return RowSample(row, (), tuple(ids), tuple(map(self._features, example.images)))

    def _pixels(self, images: Sequence[ImageRef]) -> tuple[torch.Tensor, ...]:
        data = self._data
        return tuple(
            tower_inputs(images, self._image_size, max_pixels=data.max_pixels, exif=data.exif, bit_depth=data.bit_depth)
        )

    def _drawn(self, example: Example, plan: RowPlan, epoch: int) -> list[Sample]:
        """Draw one round per conversation; with probability 1/2 the round before it is its history.

        The draw depends on (seed, epoch, conversation) only, so it is the same on every rank and in every worker.
        """
        rounds: dict[int, list[Sample]] = {}
        for sample in plan.samples:
            rounds.setdefault(sample.conversation, []).append(sample)
        drawn = []
        for number, choices in rounds.items():
            name = f"{self._seed}\0{epoch}\0{example.conversations[number].id}"
            bits = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big")
            sample = choices[(bits >> 1) % len(choices)]
            first = sample.first if bits & 1 else sample.turn
            drawn.append(Sample(number, sample.turn, first, sample.cut, sample.prompt, sample.answer))
        return drawn

    def _refuse_long_rows(self) -> None:
        limit = self._data.max_row_tokens
        if limit is None:
            return
        longest = max(self._plans, key=lambda plan: plan.tokens, default=None)
        if longest is not None and longest.tokens > limit:
            source = self._examples[longest.example].conversations[longest.samples[0].conversation].source
            raise ConfigError(
                tr(
                    "data.max_row_tokens is {limit}, but one answer with its prompt and picture takes"
                    " {tokens} tokens ({source})",
                    limit=limit,
                    tokens=longest.tokens,
                    source=source,
                ),
                hint=tr(
                    "raise data.max_row_tokens to {tokens} or more, or lower data.max_input_len", tokens=longest.tokens
                ),
                code="data-max-row-tokens",
            )

    def _fingerprint(self) -> str:
        """Return the SHA-256 of what is trained in which row.

        It changes with data, split, budgets, tokenizer and template.
        """
        digest = hashlib.sha256(f"{self._data.turns}\0{self._encoder.template}\0{self._image_size}\n".encode())
        for plan in self._plans:
            conversations = self._examples[plan.example].conversations
            for s in plan.samples:
                counts = (s.turn, s.first, s.cut, s.prompt, s.answer)
                digest.update(f"{conversations[s.conversation].id}\0{counts}\n".encode())
            digest.update(b"\n")
        return digest.hexdigest()
