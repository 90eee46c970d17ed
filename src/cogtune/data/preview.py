"""Show what the model sees of a data set: rows as training builds them, token by token."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from cogtune.configuration.shapes import IGNORED_LABEL, TREE_ROOT
from cogtune.data.boxes import Box, find_boxes
from cogtune.data.budget import Budget, Sample
from cogtune.data.records import Example, ImageRef, file_of
from cogtune.data.rows import encode_sample, plan_rows
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.encode import IMAGE
from cogtune.processing.token_file import TokenFile
from cogtune.processing.tokenizer import byte_symbols
from cogtune.processing.tree import Row, build_tree

if TYPE_CHECKING:
    from cogtune.configuration.run_config import DataSection

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NAMED = 3  # places of a row that are named one by one

Kind = Literal["context", "trained", "special", "picture"]


@dataclass(frozen=True)
class Token:
    """One token, or ``count`` tokens shown as one: adjacent image positions, or the tokens of one character."""

    text: str
    kind: Kind
    trained: bool = False
    count: int = 1


@dataclass(frozen=True)
class Segment:
    """A segment of the tree. ``depth``: number of segments before it on its path."""

    number: int
    parent: int
    depth: int
    tokens: tuple[Token, ...]

    @property
    def trained(self) -> int:
        """Number of its tokens with a label."""
        return sum(token.count for token in self.tokens if token.trained)


@dataclass(frozen=True)
class RowPreview:
    """One row. ``dropped``: answers of its example that training leaves out, over all rows of the example; ``boxes``:
    those in its texts, in thousandths of the picture."""

    key: str
    images: tuple[ImageRef, ...]
    sources: tuple[str, ...]
    segments: tuple[Segment, ...]
    tokens: int
    trained: int
    dropped: int
    boxes: tuple[Box, ...] = ()

    def counts(self) -> str:
        """Say how many tokens it has and how many are trained."""
        said = tr("{tokens} tokens, {trained} trained", tokens=self.tokens, trained=self.trained)
        if self.dropped:
            said = tr("{said}; {count} answers left out for their length", said=said, count=self.dropped)
        return said

    def places(self) -> tuple[str, ...]:
        """Say where its conversations stand: each of a few, the first and the last of many."""
        if len(self.sources) <= _NAMED:
            return self.sources
        ends = {"count": len(self.sources), "first": self.sources[0], "last": self.sources[-1]}
        return (tr("{count} places, {first} to {last}", **ends),)


def preview_rows(
    examples: Sequence[Example], data: DataSection, tokens: TokenFile, count: int, record: str | None = None
) -> Iterator[RowPreview]:
    """Yield the rows of the first ``count`` examples, or of the one that ``record`` names.

    ``record`` is an example's key, a conversation's id, or a file name.

    Raises:
        DataError: no such record, or a text over budget where ``data`` says ``error``.
    """
    chosen = list(examples[:count])
    if record is not None:
        chosen = [example for example in examples if _is_named(example, record)]
        if not chosen:
            raise DataError(
                tr("no record is called {record}", record=record),
                hint=tr("give an id as predictions have it, or a picture's file name"),
                code="preview-record",
            )
    encoder, pieces = tokens.encoder(), _Pieces(tokens)
    for fitted in Budget(encoder, data).fit(chosen):
        example = chosen[fitted.index]
        head = encoder.head_tokens(len(example.images))
        plans = plan_rows(fitted, head=head, limit=data.max_row_tokens, one_random=data.turns == "one_random")
        answers = sum(turn.trained for conversation in example.conversations for turn in conversation.turns)
        dropped = answers - len(fitted.samples)
        for plan in plans:
            row = build_tree([encode_sample(encoder, example, sample, data.max_output_len) for sample in plan.samples])
            sources = dict.fromkeys(example.conversations[sample.conversation].source for sample in plan.samples)
            labelled = sum(label != IGNORED_LABEL for label in row.labels)
            segments = tuple(_segments(row, pieces))
            boxes = tuple(dict.fromkeys(_boxes_of(example, plan.samples)))
            yield RowPreview(example.key, example.images, tuple(sources), segments, len(row), labelled, dropped, boxes)
        if not plans:
            yield RowPreview(example.key, example.images, (example.conversations[0].source,), (), 0, 0, dropped)


def _boxes_of(example: Example, samples: Sequence[Sample]) -> Iterator[Box]:
    """Yield the boxes in the questions and answers that a row trains."""
    for sample in samples:
        turn = example.conversations[sample.conversation].turns[sample.turn]
        for text in (turn.question, turn.answer):
            yield from find_boxes(text)


def _is_named(example: Example, record: str) -> bool:
    names = {example.key, *(conversation.id for conversation in example.conversations)}
    return record in names or any(record in (image.name, file_of(image).name) for image in example.images)


def _segments(row: Row, pieces: _Pieces) -> Iterator[Segment]:
    depths: list[int] = []
    for number, parent in enumerate(row.segment_parents):
        depths.append(0 if parent == TREE_ROOT else depths[parent] + 1)
        places = [place for place, segment in enumerate(row.segment_ids) if segment == number]
        yield Segment(number, parent, depths[number], tuple(_tokens(row, places, pieces)))


def _tokens(row: Row, places: list[int], pieces: _Pieces) -> Iterator[Token]:
    """Yield the tokens at ``places``, merging image positions and the tokens of one character."""
    for key, run in groupby(places, key=lambda place: _look(row, place)):
        ids = [row.input_ids[place] for place in run]
        if key == "picture":
            yield Token("", "picture", count=len(ids))
        else:
            yield from pieces.split(ids, trained=key == "trained")


def _look(row: Row, place: int) -> str:
    if row.token_type_ids[place] == IMAGE:
        return "picture"
    return "context" if row.labels[place] == IGNORED_LABEL else "trained"


class _Pieces:
    """Text of tokens. Tokens that form one character together are shown together; stray bytes as numbers."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokenizer: Any = tokens.tokenizer
        self._bytes = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        # SentencePiece's pieces are text, and its bytes have tokens of their own
        self._pieces = bool(getattr(self._tokenizer.model, "byte_fallback", False))
        self._special = {id_ for id_, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def split(self, ids: Sequence[int], *, trained: bool) -> Iterator[Token]:
        plain: Kind = "trained" if trained else "context"
        held, count = b"", 0
        for id_ in ids:
            content = self._content(id_)
            if isinstance(content, str):
                if held:
                    yield Token(_numbers(held), plain, trained, count)
                    held, count = b"", 0
                yield Token(content, "special", trained)
                continue
            held, count = held + content, count + 1
            with contextlib.suppress(UnicodeDecodeError):
                yield Token(held.decode("utf-8"), plain, trained, count)
                held, count = b"", 0
        if held:
            yield Token(_numbers(held), plain, trained, count)

    def _content(self, id_: int) -> bytes | str:
        """Return the bytes of a token, or the name of a special token."""
        piece = self._tokenizer.id_to_token(id_)
        if piece is None:
            return f"<{id_}>"
        if id_ in self._special:
            return str(piece)
        if self._pieces:
            byte = _BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else str(piece).replace("\u2581", " ").encode()
        if not all(symbol in self._bytes for symbol in piece):
            return str(piece).encode()
        return bytes(self._bytes[symbol] for symbol in piece)


def _numbers(content: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in content)
