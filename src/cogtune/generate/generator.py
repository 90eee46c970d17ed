"""A model that answers: one question as a stream, or many as a batch.

Questions, images and history become tokens by the same functions as in training. The tower's output is kept while
questions about the same image follow each other, as they do in a chat and in a data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from cogtune.errors import OutOfMemoryError
from cogtune.generate.decoding import Decoding
from cogtune.generate.history import Turns
from cogtune.generate.stream import Answer, TextPieces
from cogtune.processing.image import read_image
from cogtune.processing.processor import CogVLM2Processor

Picture = Image.Image | str | os.PathLike[str]
"""A PIL image, or a file's path."""
Images = Picture | Sequence[Picture] | None
Ask = tuple[Images, str, Turns]
"""Images (one, several in order, or None), question, and the earlier (question, answer) pairs."""

GREEDY = Decoding()


class Generator:
    """Answers with ``model`` (plain, or with a peft adapter) and its ``processor``; see `cogtune.load_generator`.

    It remembers the last images' features, so after the tower's weights have changed make a new one.

    Example:
        >>> generator = cogtune.load_generator(adapter="output")
        >>> generator.answer("photo.jpg", "What is this?")
        >>> generator.answer_batch([("a.jpg", "What is this?"), ("b.jpg", "And this?"), (None, "What is a bus?")])

    Args:
        template: ``chat``, ``vqa`` or ``base``; None: the checkpoint's own.
        decoding: how the next token is chosen where a call does not say.
        exif: ``apply`` turns the pictures of files as their orientation says; ``ignore``, as in training by default.
        max_pixels: files of larger pictures are refused; None: Pillow's own limit.
    """

    def __init__(
        self,
        model: Any,
        processor: CogVLM2Processor,
        *,
        template: str | None = None,
        decoding: Decoding = GREEDY,
        exif: str = "ignore",
        max_pixels: int | None = None,
    ) -> None:
        # peft puts its layers into the base model; its own generate() would only pass the call on
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor
        self.template = template
        self.decoding = decoding
        self._read = partial(read_image, max_pixels=max_pixels, exif=exif)
        self._files: dict[tuple[str, int, int], Image.Image] = {}
        self.published: GenerationConfig = self.model.generation_config
        self._features: dict[int, tuple[Image.Image, torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def close(self) -> None:
        """No more questions: processes that hold the model together may end."""

    def answer(self, images: Images, question: str, history: Turns = (), decoding: Decoding | None = None) -> str:
        """The answer to one question, white space around it left out.

        Args:
            images: a PIL image, the path of a file, several of them in a list, or None for a question about none.
            question: its text.
            history: earlier (question, answer) pairs, oldest first.
            decoding: how the next token is chosen, and how many; None: as the generator was made.

        Raises:
            InputError: more images than the model takes.
            DataError: a file that cannot be read.
            OutOfMemoryError: it does not fit on the device.
        """
        return self.answer_batch([(images, question, history)], decoding)[0]

    def answer_batch(self, asks: Sequence[Ask | tuple[Images, str]], decoding: Decoding | None = None) -> list[str]:
        """One answer per question, all computed at once; see `answer`.

        Rows are padded on the left, which changes nothing but rounding.

        Args:
            asks: ``(images, question)`` or ``(images, question, history)`` each.

        Raises:
            InputError: more images in a question than the model takes.
            DataError: a file that cannot be read.
            OutOfMemoryError: the batch does not fit on the device.
        """
        if not asks:
            return []
        with _explained_out_of_memory(len(asks)):
            inputs = self._inputs(asks)
            ids = self._generate(inputs, decoding or self.decoding)
        start = inputs["input_ids"].shape[1]
        return [self.processor.decode(self._until_end(row[start:].tolist())).strip() for row in ids]

    def stream(self, images: Images, question: str, history: Turns = (), decoding: Decoding | None = None) -> Answer:
        """The answer to one question, piece by piece, from a thread; see `answer`.

        Returns:
            An iterator over texts; its ``stop()`` ends the answer.

        Raises:
            InputError: more images than the model takes.
            DataError: a file that cannot be read.
            OutOfMemoryError: here or while iterating.
        """
        decoding = decoding or self.decoding
        ends = set(self._generation_config(decoding).eos_token_id)
        pieces = TextPieces(lambda ids: self.processor.decode([token for token in ids if token not in ends]))
        with _explained_out_of_memory(1):
            inputs = self._inputs([(images, question, history)])

        def generate(streamer: Any, criterion: Any) -> None:
            with _explained_out_of_memory(1):
                self._generate(inputs, decoding, streamer=streamer, stopping_criteria=[criterion])

        return Answer(generate, pieces)

    def _generation_config(self, decoding: Decoding) -> GenerationConfig:
        return decoding.to_generation_config(self.processor.config, self.published)

    def _inputs(self, asks: Sequence[Ask | tuple[Images, str]]) -> dict[str, torch.Tensor]:
        rows: list[dict[str, torch.Tensor]] = []
        shown: list[Image.Image] = []
        files = dict(self._files)
        self._files = {}
        for ask in asks:
            own = [self._opened(image, files) for image in _listed(ask[0])]
            shown += own
            history = ask[2] if len(ask) == 3 else ()
            encoded = self.processor.encode(ask[1], history, images=len(own), template=self.template)
            rows.append(
                {
                    "input_ids": torch.tensor([encoded.input_ids]),
                    "token_type_ids": torch.tensor([encoded.token_type_ids]),
                    "attention_mask": torch.ones(1, len(encoded), dtype=torch.int64),
                }
            )
        inputs: dict[str, torch.Tensor] = {k: v.to(self.device) for k, v in self.processor.pad_left(rows).items()}
        if shown:
            inputs["image_features"] = self._encoded(shown)
        return inputs

    def _opened(self, image: Picture, before: Mapping[tuple[str, int, int], Image.Image]) -> Image.Image:
        """An image, read where it is a file's path; the same object for a file of this batch or of the one ``before``,
        so that its features are computed once."""
        if isinstance(image, Image.Image):
            return image
        path = Path(image).expanduser()
        try:
            status = path.stat()
            key = (str(path), status.st_size, status.st_mtime_ns)
        except OSError:
            key = (str(path), 0, 0)  # reading says what is wrong
        self._files[key] = self._files.get(key) or before.get(key) or self._read(path)
        return self._files[key]

    @torch.no_grad()
    def _encoded(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """The tower's output [N, grid * grid, width]; images of the last batch are not computed again."""
        wanted = {id(image): image for image in images}
        kept = {key: self._features[key] for key in wanted if key in self._features}
        new = [image for key, image in wanted.items() if key not in kept]
        if new:
            pixels = torch.cat([self.processor.pixels(image) for image in new]).to(self.device)
            features = self._features_of(pixels)
            kept |= {id(image): (image, row) for image, row in zip(new, features, strict=True)}
        self._features = kept
        return torch.stack([kept[id(image)][1] for image in images])

    @torch.no_grad()
    def _features_of(self, pixels: torch.Tensor) -> torch.Tensor:
        with _evaluating(self.model):
            features: torch.Tensor = self.model.model.encode_images(pixels)
        return features

    def _generate(self, inputs: dict[str, torch.Tensor], decoding: Decoding, **options: Any) -> torch.Tensor:
        config = self._generation_config(decoding)
        with _evaluating(self.model), _no_defaults(self.model, config):
            ids: torch.Tensor = self.model.generate(**inputs, generation_config=config, **options)
        return ids

    def _until_end(self, ids: list[int]) -> list[int]:
        """Without the end token and the padding behind it."""
        ends = set(self._generation_config(GREEDY).eos_token_id)
        return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _listed(images: Images) -> list[Picture]:
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image | str | os.PathLike) else list(images)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _no_defaults(model: Any, config: GenerationConfig) -> Iterator[None]:
    """transformers fills what a call leaves open from the model's own settings; ours leave nothing open on purpose
    (the checkpoint's ``max_length``, for one, would count the picture)."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _explained_out_of_memory(rows: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        smaller = f"--batch-size {max(rows // 2, 1)}, " if rows > 1 else ""
        raise OutOfMemoryError(
            f"out of memory while answering {rows} question{'s' if rows > 1 else ''} at once",
            hint=f"try {smaller}--model.dtype bfloat16, fewer --max-new-tokens, or another --device",
        ) from error
