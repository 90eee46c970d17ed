"""Requests to the engine, and their answers while they are computed: from any thread, piece by piece or whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image

from cogtune.errors import InputError
from cogtune.generate.decoding import Decoding
from cogtune.generate.picture_cache import image_digest
from cogtune.generate.stream import Answer, TextPieces
from cogtune.language import tr
from cogtune.processing.encode import IMAGE, TEXT, Encoded
from cogtune.processing.processor import CogVLM2Processor


@dataclass(frozen=True)
class Features:
    """What the tower computed of an image before: ``values`` [grid * grid, width], under a ``key`` of its pixels."""

    key: bytes
    values: torch.Tensor


@dataclass(frozen=True)
class Resized:
    """An image as it goes to the device: uint8 [S, S, 3] or float32 [3, S, S]; empty where what was computed of it is
    kept."""

    values: torch.Tensor


Shown = Image.Image | torch.Tensor | Features
"""An image: as a file holds it, as the tower takes it, float32 [3, S, S], or what the tower computed of it."""
Listener = Callable[[str | BaseException | None], None]


@dataclass(frozen=True)
class Request:
    """One question.

    Args:
        encoded: the prompt's tokens, with positions for its images.
        images: the images at those positions, in order.
        decoding: how tokens are chosen, and the most tokens.
        seed: random seed if ``decoding`` samples. The draws do not depend on what else is being answered.
        stop: texts that end the answer; they are not part of it.
        image_keys: equal for equal images; None: digests of the pixels, computed by `submit`.
        adapter: name of one of the engine's adapters; None: the model without them.
    """

    encoded: Encoded
    images: tuple[Shown | Resized, ...]
    decoding: Decoding
    seed: int = 0
    stop: tuple[str, ...] = ()
    image_keys: tuple[bytes, ...] | None = None
    adapter: str | None = None

    @cached_property
    def beginning(self) -> int:
        """Number of tokens up to the end of the last image, 0 without one."""
        types = self.encoded.token_type_ids
        return len(types) - types[::-1].index(IMAGE) if self.images else 0

    @cached_property
    def beginning_text(self) -> tuple[int, ...]:
        """The tokens of text up to the end of the last image."""
        pairs = zip(self.encoded.input_ids[: self.beginning], self.encoded.token_type_ids, strict=False)
        return tuple(token for token, kind in pairs if kind == TEXT)

    @property
    def text(self) -> list[int]:
        """The tokens after the last image."""
        return self.encoded.input_ids[self.beginning :]


def key_of(image: Shown | Resized) -> bytes:
    """Return what an image is known by."""
    if isinstance(image, Resized):
        return image_digest(image.values)
    return image.key if isinstance(image, Features) else image_digest(image)


def check(request: Request, columns: int, num_image_tokens: int) -> None:
    """Refuse a request that cannot be answered in slots of so many ``columns``.

    Raises:
        InputError: prompt and answer do not fit, tokens and images do not go together, or there is no text.
    """
    length = len(request.encoded)
    if length + request.decoding.max_new_tokens > columns:
        raise InputError(
            tr(
                "the prompt has {length} tokens; with an answer of up to {max_new_tokens} that is more"
                " than the {columns} there is room for",
                length=length,
                max_new_tokens=request.decoding.max_new_tokens,
                columns=columns,
            ),
            hint=tr("shorten the question or its history, or lower --max-new-tokens"),
            code="question-too-long",
        )
    places = sum(request.encoded.token_type_ids) // num_image_tokens
    if places != len(request.images):
        raise InputError(
            tr(
                "the prompt has places for {places} images, {images} are given",
                places=places,
                images=len(request.images),
            )
        )
    if not request.text:
        raise InputError(tr("the question is empty: nothing follows the last image"), hint=tr("ask something"))


class Pending(Answer):
    """An answer that is being computed: iterate over its pieces, or ask for the whole `text`.

    Attributes:
        finish_reason: ``stop`` (an end token or a stop text), ``length`` (the most tokens allowed) or ``cancelled``;
            None before the end.
        token_ids: the answer's tokens so far, without an end token.
    """

    def __init__(self, request: Request, listener: Listener | None = None) -> None:
        self.request = request
        self._listener = listener
        self.finish_reason: str | None = None
        self.token_ids: list[int] = []
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._cancelled = threading.Event()
        self._read = False

    def __next__(self) -> str:
        while not self._read:
            item = self._pieces.get()
            if isinstance(item, str):
                if item:
                    return item
                continue
            self._read = True
            if item is not None:
                raise item
        raise StopIteration

    def cancel(self) -> None:
        """End it after the token being computed; the pieces so far stay valid."""
        self._cancelled.set()

    def stop(self) -> None:
        """`cancel`, and wait until its slot is free."""
        self.cancel()
        self._ended.wait()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def push(self, text: str) -> None:
        """Hand a piece to the reader; called by the engine."""
        self._pieces.put(text)
        if self._listener is not None:
            self._listener(text)

    def end(self, reason: str | None, error: BaseException | None = None) -> None:
        """End the answer; called by the engine."""
        self.finish_reason = reason
        self._ended.set()
        self._pieces.put(error)
        if self._listener is not None:
            self._listener(error)


class AnswerText:
    """Turns tokens into text that can be shown: whole characters, and nothing that could be the start of a
    stop text.
    """

    def __init__(self, processor: CogVLM2Processor, stop: Sequence[str]) -> None:
        self._pieces = TextPieces(processor.decode)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown now."""
        return self._pieces.trimmed(self._before_stop(self._pieces.complete(token)))

    def finish(self) -> str:
        """Return the rest at the end."""
        if self.stopped:
            return ""
        text = self._before_stop(self._pieces.rest())
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        return self._pieces.trimmed(text + rest)

    def _before_stop(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
