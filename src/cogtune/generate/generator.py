"""The public generator: one question as a stream, or many at once.

Questions, images and history are encoded by the functions that training uses, and an engine answers them
(`generate.engine`): many at a time, reusing what it computed of an image for the next question about it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from cogtune.generate.choices import ChoiceScores, ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.history import Turns
from cogtune.generate.requests import Features, Request, Shown
from cogtune.generate.stream import Answer
from cogtune.model.stacked_adapters import StackedAdapters
from cogtune.processing.clip import is_clip, refuse_picture
from cogtune.processing.encode import Encoded
from cogtune.processing.image import read_image
from cogtune.processing.processor import CogVLM2Processor

Picture = Image.Image | torch.Tensor | Features | str | os.PathLike[str]
"""A PIL image, a file's path, an image as the tower takes it, float32 [3, S, S], or what the tower computed of it."""
Images = Picture | Sequence[Picture] | None
Ask = tuple[Images, str, Turns]
"""Images (one, several in order, or None), question, and the earlier (question, answer) pairs."""

GREEDY = Decoding()


class Generator:
    """Answers with ``model`` (plain, or with a peft adapter) and its ``processor``; see `cogtune.load_generator`.

    It remembers what was computed of images, so after the weights have changed make a new one.

    Example:
        >>> generator = cogtune.load_generator(adapter="output")
        >>> generator.answer("photo.jpg", "What is this?")
        >>> generator.answer_batch([("a.jpg", "What is this?"), ("b.jpg", "And this?"), (None, "What is a bus?")])

    Args:
        template: ``chat``, ``vqa`` or ``base``; None: the checkpoint's own.
        decoding: how the next token is chosen where a call does not say.
        exif: ``apply`` turns the pictures of files as their orientation says; ``ignore``, as in training by default.
        bit_depth: ``scale`` brings pictures with more than 8 bits a channel into range; see `read_image`.
        max_pixels: files of larger pictures are refused; None: Pillow's own limit.
        slots: the most answers that are computed at once.
        adapters: several in place on ``model`` beside each other; see `with_adapter`.
        guesses: tokens that are guessed by prompt look-up while a greedy answer is alone; see `InferenceEngine`.
        leads: whether other ranks hold the rest of ``model``; see `InferenceEngine`.

    Attributes:
        queue_ahead: how many questions it pays to have under way, in multiples of ``slots``.
    """

    queue_ahead = 2  # while answers are computed, the next images are decoded

    def __init__(
        self,
        model: Any,
        processor: CogVLM2Processor,
        *,
        template: str | None = None,
        decoding: Decoding = GREEDY,
        exif: str = "ignore",
        bit_depth: str = "clip",
        max_pixels: int | None = None,
        slots: int = 8,
        adapters: StackedAdapters | None = None,
        guesses: int = 0,
        leads: bool = False,
    ) -> None:
        # peft injects its layers into the base model; its own generate() would only forward the call
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor
        self.template = template
        self.decoding = decoding
        self._max_pixels = max_pixels
        self._read = partial(read_image, max_pixels=max_pixels, exif=exif, bit_depth=bit_depth)
        self._files: dict[tuple[str, int, int], Image.Image] = {}
        self._earlier: dict[tuple[str, int, int], Image.Image] = {}
        self.published: GenerationConfig = self.model.generation_config
        self.slots = slots
        self.adapters, self.guesses, self._leads = adapters, guesses, leads
        self._adapter: str | None = None
        self._engine: InferenceEngine | None = None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    def close(self) -> None:
        """End the engine; with tensor parallelism, let the other processes end."""
        if self._engine is not None:
            self._engine.close()

    def answer(self, images: Images, question: str, history: Turns = (), decoding: Decoding | None = None) -> str:
        """Answer one question; surrounding white space is stripped.

        Args:
            images: a PIL image, the path of a file (for a video model, of a clip), several of them in a list, or None
                for a question about none.
            question: its text.
            history: earlier (question, answer) pairs, oldest first.
            decoding: how the next token is chosen, and how many; None: as the generator was made.

        Raises:
            InputError: more images than the model takes.
            DataError: a file that cannot be read.
            OutOfMemoryError: it does not fit on the device.
        """
        return self.answer_batch([(images, question, history)], decoding)[0]

    @property
    def engine(self) -> InferenceEngine:
        """The engine, created on first use."""
        if self._engine is None:
            self._engine = InferenceEngine(
                self.model,
                self.processor,
                slots=self.slots,
                adapters=self.adapters,
                guesses=self.guesses,
                leads=self._leads,
            )
        return self._engine

    def with_adapter(self, name: str | None) -> Generator:
        """Return a generator that answers with one of the ``adapters``; None: with the base model.

        Both share one engine, so their answers are computed together.

        Raises:
            InputError: there is no such adapter.
        """
        self.engine.prefill.adapter(name)
        found = copy(self)
        found._adapter = name
        return found

    def answer_batch(
        self,
        asks: Sequence[Ask | tuple[Images, str]],
        decoding: Decoding | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer several questions at once; see `answer`.

        Args:
            asks: ``(images, question)`` or ``(images, question, history)`` each.
            seeds: of the draws, one each, where ``decoding`` draws; None: from torch's random numbers.

        Raises:
            InputError: more images in a question than the model takes.
            DataError: a file that cannot be read.
            OutOfMemoryError: an answer does not fit on the device.
        """
        given = _drawn_seeds(len(asks)) if seeds is None else seeds
        with self._reading():
            pending = [self.submit(ask, decoding, seed) for ask, seed in zip(asks, given, strict=True)]
        return [answer.text() for answer in pending]

    def stream(self, images: Images, question: str, history: Turns = (), decoding: Decoding | None = None) -> Answer:
        """Answer one question piece by piece; see `answer`.

        Returns:
            An iterator over texts; its ``stop()`` ends the answer.

        Raises:
            InputError: more images than the model takes.
            DataError: a file that cannot be read.
            OutOfMemoryError: while iterating.
        """
        with self._reading():
            return self.submit((images, question, history), decoding, _drawn_seeds(1)[0])

    def submit(self, ask: Ask | tuple[Images, str], decoding: Decoding | None = None, seed: int = 0) -> Answer:
        """Start answering without waiting; the result's ``text()`` waits. ``seed``: random seed if ``decoding``
        samples.

        Raises:
            InputError, DataError: as for `answer`.
        """
        encoded, images, wanted = self._asked(ask, decoding)
        return self.engine.submit(Request(encoded, images, wanted, seed, adapter=self._adapter))

    def score(self, images: Images, questions: Sequence[ClosedQuestion]) -> list[ChoiceScores]:
        """Return the score of each given answer to each question about the same images; see `generate.choices`.

        Raises:
            InputError: no choices, equal ones, or more tokens than fit. DataError: a file that cannot be read.
        """
        with self._reading():
            return self.engine.score(self._shown(images), questions, self.template, self._adapter)

    def _asked(
        self, ask: Ask | tuple[Images, str], decoding: Decoding | None
    ) -> tuple[Encoded, tuple[Shown, ...], Decoding]:
        """Return a question's tokens, images and settings; the answer is limited to the tokens that fit."""
        images = tuple(self._shown(ask[0]))
        history = ask[2] if len(ask) == 3 else ()
        encoded = self.processor.encode(ask[1], history, images=len(images), template=self.template)
        wanted = decoding or self.decoding
        room = self.processor.config.most_tokens - len(encoded)
        return encoded, images, replace(wanted, max_new_tokens=max(1, min(wanted.max_new_tokens, room)))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Decode a file once if several questions name it; files of the previous call are remembered."""
        self._earlier, self._files = self._files, {}
        yield
        self._earlier = {}

    def _shown(self, images: Images) -> list[Shown]:
        """Return the images of a question; a clip's path stands for its frames."""
        found: list[Shown] = []
        for image in listed(images):
            if isinstance(image, str | os.PathLike) and is_clip(image):
                found += self.processor.clip(Path(image).expanduser(), max_pixels=self._max_pixels)
            else:
                found.append(self._opened(image))
        return found

    def _opened(self, image: Picture) -> Shown:
        """Return an image, decoding a path; the same object for a file of this call or of the previous one."""
        if isinstance(image, Image.Image | torch.Tensor | Features):
            return image
        if self.processor.config.numbered_images:
            refuse_picture(image)
        path = Path(image).expanduser()
        try:
            status = path.stat()
            key = (str(path), status.st_size, status.st_mtime_ns)
        except OSError:
            key = (str(path), 0, 0)  # reading says what is wrong
        self._files[key] = self._files.get(key) or self._earlier.get(key) or self._read(path)
        return self._files[key]


def _drawn_seeds(count: int) -> list[int]:
    """Draw seeds from torch's generator, so that ``torch.manual_seed`` makes answers repeatable."""
    found: list[int] = torch.randint(2**62, (count,)).tolist()
    return found


def listed(images: Images) -> list[Picture]:
    """Return one, several or no images as a list."""
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image | torch.Tensor | Features | str | os.PathLike) else list(images)
