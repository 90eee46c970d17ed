"""Text of an answer while it is generated: whole characters as soon as their tokens are complete."""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from cogtune.generate.at_exit import end_at_exit

_INCOMPLETE = "\ufffd"
_EXIT = 10.0  # seconds that an exiting interpreter waits for a token


class TextPieces:
    """Turns token ids into text, one at a time.

    A character can take several byte-level tokens; it is emitted with the last one. White space at both ends of the
    answer is dropped, so the joined pieces are the stripped answer. Tokens are decoded together with those before them,
    because a SentencePiece tokenizer drops the space in front of a text's first word.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._before: list[int] = []
        self._waiting: list[int] = []
        self._given = 0
        self._spaces = ""
        self._begun = False

    def push(self, token: int) -> str:
        """Return the text that this token completes, often none."""
        return self.trimmed(self.complete(token))

    def finish(self) -> str:
        """Return what an answer that ends inside a character still holds."""
        return self.trimmed(self.rest())

    def complete(self, token: int) -> str:
        """Do as `push`, with white space that may be the answer's end."""
        self._waiting.append(token)
        text = self._text()
        # a byte-level tokenizer writes one replacement character for bytes of which more are to come, a SentencePiece
        # one for each byte
        whole = text.rstrip(_INCOMPLETE)
        piece, self._given = whole[self._given :], len(whole)
        if whole == text:
            self._before, self._waiting, self._given = self._waiting, [], 0
        return self._without_lead(piece)

    def rest(self) -> str:
        """Do as `finish`, with white space at the end."""
        text = self._text() if self._waiting else ""
        piece, self._waiting, self._given = text[self._given :], [], 0
        return self._without_lead(piece)

    def trimmed(self, text: str) -> str:
        """Keep white space at the end back until something follows it."""
        text = self._spaces + text
        kept = text.rstrip()
        self._spaces = text[len(kept) :]
        return kept

    def _text(self) -> str:
        """Return what the waiting tokens add to those before them."""
        if not self._before:
            return self._decode(self._waiting)
        return self._decode(self._before + self._waiting)[len(self._decode(self._before)) :]

    def _without_lead(self, text: str) -> str:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text


class Answer(Iterator[str]):
    """An answer being computed: iterate over its pieces, or ask for the whole `text`."""

    def text(self) -> str:
        """Wait for the end and return the whole stripped answer.

        Raises:
            OutOfMemoryError, RunError: it could not be computed.
        """
        return "".join(self)

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it is finished."""

    @abstractmethod
    def stop(self) -> None:
        """End it after the token being computed, and wait for that; the pieces so far stay valid."""


class StreamedAnswer(Answer):
    """An answer that ``generate()`` computes in a thread."""

    def __init__(self, generate: Callable[[BaseStreamer, StoppingCriteria], Any], pieces: TextPieces) -> None:
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(generate, pieces), daemon=True)
        self._thread.start()
        end_at_exit(self)

    def __next__(self) -> str:
        while not self._done:
            item = self._queue.get()
            if item is None or isinstance(item, BaseException):
                self._done = True
                self._thread.join()
                if item is not None:
                    raise item
            elif item:
                return item
        raise StopIteration

    @property
    def done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End it, and wait until the model is free again."""
        self._stop.set()
        self._thread.join()

    def abandon(self) -> None:
        """`stop`, but wait only a few seconds: other processes that take part may be gone."""
        self._stop.set()
        self._thread.join(_EXIT)

    def _run(self, generate: Callable[[BaseStreamer, StoppingCriteria], Any], pieces: TextPieces) -> None:
        end: BaseException | None = None
        try:
            generate(_Pushing(pieces, self._queue.put), _StopWhenSet(self._stop))
            self._queue.put(pieces.finish())
        except BaseException as error:  # any error has to reach the reader of the pieces
            end = error
        self._queue.put(end)


class _Pushing(BaseStreamer):
    """The streamer that ``generate()`` calls: first with the prompt, then with each token."""

    def __init__(self, pieces: TextPieces, put: Callable[[str], None]) -> None:
        self._pieces = pieces
        self._put = put
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._put(self._pieces.push(token))

    def end(self) -> None:
        """Does nothing: the rest is fetched when ``generate()`` has returned."""


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)
