"""A model that answers: one question as a stream, or many as a batch.

Questions, images and history become tokens by the same functions as in training. The tower's output is kept while
questions about the same image follow each other, as they do in a chat and in a data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from cogtune.errors import OutOfMemoryError
from cogtune.generate.decoding import Decoding
from cogtune.generate.history import Turns
from cogtune.generate.stream import Answer, TextPieces
from cogtune.processing.processor import CogVLM2Processor

Images = Image.Image | Sequence[Image.Image] | None
Ask = tuple[Images, str, Turns]
"""Images (one, several in order, or None), question, and the earlier (question, answer) pairs."""

GREEDY = Decoding()


class Generator:
    """Answers with ``model`` (plain, or with a peft adapter) and its ``processor``.

    It remembers the last images' features, so after the tower's weights have changed make a new one.

    Args:
        template: ``chat``, ``vqa`` or ``base``; None: the checkpoint's own.
    """

    def __init__(self, model: Any, processor: CogVLM2Processor, *, template: str | None = None) -> None:
        # peft puts its layers into the base model; its own generate() would only pass the call on
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor
        self.template = template
        self.decoding = GREEDY
        """How the next token is chosen where a call does not say."""
        self.published: GenerationConfig = self.model.generation_config
        self._features: dict[int, tuple[Image.Image, torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def close(self) -> None:
        """No more questions: processes that hold the model together may end."""

    def answer_batch(self, asks: Sequence[Ask], decoding: Decoding = GREEDY) -> list[str]:
        """One answer per question, white space around it left out.

        Rows are padded on the left, which changes nothing but rounding.

        Raises:
            InputError: more images in a question than the model takes.
            OutOfMemoryError: the batch does not fit on the device.
        """
        if not asks:
            return []
        with _explained_out_of_memory(len(asks)):
            inputs = self._inputs(asks)
            ids = self._generate(inputs, decoding)
        start = inputs["input_ids"].shape[1]
        return [self.processor.decode(self._until_end(row[start:].tolist())).strip() for row in ids]

    def stream(self, images: Images, query: str, history: Turns = (), decoding: Decoding = GREEDY) -> Answer:
        """The answer to one question, piece by piece, from a thread.

        Raises:
            InputError: more images than the model takes.
            OutOfMemoryError: here or while iterating.
        """
        ends = set(self._generation_config(decoding).eos_token_id)
        pieces = TextPieces(lambda ids: self.processor.decode([token for token in ids if token not in ends]))
        with _explained_out_of_memory(1):
            inputs = self._inputs([(images, query, history)])

        def generate(streamer: Any, criterion: Any) -> None:
            with _explained_out_of_memory(1):
                self._generate(inputs, decoding, streamer=streamer, stopping_criteria=[criterion])

        return Answer(generate, pieces)

    def _generation_config(self, decoding: Decoding) -> GenerationConfig:
        return decoding.to_generation_config(self.processor.config, self.published)

    def _inputs(self, asks: Sequence[Ask]) -> dict[str, torch.Tensor]:
        rows: list[dict[str, torch.Tensor]] = []
        shown: list[Image.Image] = []
        for images, query, history in asks:
            own = _listed(images)
            shown += own
            encoded = self.processor.encode(query, history, images=len(own), template=self.template)
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


def _listed(images: Images) -> list[Image.Image]:
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image) else list(images)


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
