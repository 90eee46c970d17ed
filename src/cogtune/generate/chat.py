"""A conversation about images or none, and the loop that reads it line by line.

The prompt is the model's own template around the whole conversation, rebuilt for every question by the functions that
training uses. Answers go to ``write``; notes, errors and prompts to ``note``. So piped output holds only answers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cogtune.errors import CogtuneError, RunError
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.history import fit_history, prompt_limit
from cogtune.generate.requests import Shown
from cogtune.language import phrase, tr
from cogtune.processing.clip import is_clip
from cogtune.processing.image import read_image

HELP = phrase(
    "/image PATH   show a picture; the conversation starts again\n/clear        forget"
    " picture and conversation\n/help         this list\n/quit         end (so does the end of"
    " input)\nAnything else is a question; one that starts with a slash needs a space before"
    " it. Ctrl-C stops an answer."
)

Write = Callable[[str], None]
ReadLine = Callable[[], str | None]


class Chat:
    """A conversation: its images, its history, and how to answer."""

    def __init__(
        self,
        generator: Generator,
        decoding: Decoding,
        *,
        max_input_len: int | None = None,
        max_pixels: int | None = None,
        exif: str = "ignore",
        bit_depth: str = "clip",
    ) -> None:
        self.generator = generator
        self.decoding = decoding
        self.max_input_len = max_input_len
        self._read = partial(read_image, max_pixels=max_pixels, exif=exif, bit_depth=bit_depth)
        self.images: tuple[Shown, ...] = ()
        self.history: list[tuple[str, str]] = []

    def show(self, path: str | Path) -> str:
        """Load a picture and start a new conversation; returns what to tell the user.

        Raises:
            DataError: not a readable picture; the conversation stays as it was.
        """
        restarted = tr("; the conversation starts again") if self.history else ""
        if self.generator.processor.config.numbered_images or is_clip(path):
            self.images = tuple(self.generator._shown(path))
            self.history = []
            return tr("clip: {path} ({frames} frames){restarted}", path=path, frames=len(self.images),
                      restarted=restarted)  # fmt: skip
        image = self._read(Path(path).expanduser())
        self.images, self.history = (image,), []
        return tr(
            "picture: {path} ({width} x {height}){restarted}",
            path=path,
            width=image.width,
            height=image.height,
            restarted=restarted,
        )

    def clear(self) -> None:
        """Forget pictures and history."""
        self.images, self.history = (), []

    def ask(self, query: str, write: Write, note: Write) -> str:
        """Stream the answer to ``query`` and add both to the history. Ctrl-C stops it; what was generated so far is
        kept.

        Raises:
            DataError: the question alone does not fit.
            OutOfMemoryError: the device is too small.
        """
        processor = self.generator.processor
        limit = prompt_limit(
            processor.config,
            head=processor.encoder.head_tokens(len(self.images), self.generator.template),
            max_new_tokens=self.decoding.max_new_tokens,
            max_input_len=self.max_input_len,
        )
        kept, dropped = fit_history(processor.encoder, query, self.history, limit, self.generator.template)
        if dropped:
            self.history = kept
            plural = "s" if dropped > 1 else ""
            note(
                tr(
                    "[{dropped} oldest turn{s} dropped: the conversation exceeds {limit} tokens]",
                    dropped=dropped,
                    s=plural,
                    limit=limit,
                )
            )
        pieces: list[str] = []
        try:
            answer = self.generator.stream(self.images, query, self.history, self.decoding)
        except KeyboardInterrupt:
            note("[stopped]")
            return ""
        try:
            for piece in answer:
                pieces.append(piece)
                write(piece)
        except KeyboardInterrupt:
            note(tr("\n[stopping; Ctrl-C again ends]"))
            answer.stop()
        text = "".join(pieces)
        if text:
            self.history.append((query, text))
        return text


def run_chat(chat: Chat, read_line: ReadLine, write: Write, note: Write) -> None:
    """Read questions and commands until ``/quit`` or the end of the input (None).

    Errors are printed and the conversation goes on; KeyboardInterrupt between answers ends it.
    """
    while (line := read_line()) is not None:
        word, _, rest = line.rstrip("\r\n").partition(" ")
        if word == "/quit":
            return
        try:
            if word.startswith("/") and "/" not in word[1:]:
                _command(chat, word, rest.strip(), note)
            elif line.strip():
                chat.ask(line.strip(), write, note)
                write("\n")
        except RunError:
            raise
        except CogtuneError as error:
            note(error.render())


def _command(chat: Chat, word: str, rest: str, note: Write) -> None:
    if word == "/image" and rest:
        note(chat.show(_path(rest)))
    elif word == "/clear":
        chat.clear()
        note(tr("picture and conversation forgotten"))
    elif word == "/help":
        note(tr(HELP))
    elif word == "/image":
        note(tr("/image needs the path of a picture"))
    else:
        note(tr("{word} is not a command\n{help}", word=word, help=tr(HELP)))


def _path(text: str) -> str:
    """Return a path that was typed or dropped into a terminal, which adds quotes or escapes spaces."""
    if Path(text).expanduser().exists():
        return text
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    return words[0] if len(words) == 1 else text
