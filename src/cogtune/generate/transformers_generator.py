"""Answers through transformers' ``generate()``: the engine's test oracle, and the way to answer with models that are
spread over several devices, or whose layers are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from cogtune.errors import OutOfMemoryError, SetupError
from cogtune.generate.choices import ChoiceScores, ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import GREEDY, Ask, Generator, Images
from cogtune.generate.history import Turns
from cogtune.generate.requests import Shown
from cogtune.generate.stream import Answer, StreamedAnswer, TextPieces
from cogtune.language import tr


class TransformersGenerator(Generator):
    """Like `Generator`, in batches through the model's ``generate()``.

    The tower's output is reused while consecutive questions are about the same image.
    """

    queue_ahead = 1

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._features: dict[int, tuple[Shown, torch.Tensor]] = {}
        self._batch = _Batch([])

    def close(self) -> None:
        """With tensor parallelism, let the other processes end."""

    def answer_batch(
        self,
        asks: Sequence[Ask | tuple[Images, str]],
        decoding: Decoding | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer several questions at once; see `Generator.answer_batch`.

        Rows are padded on the left, which changes only rounding. Random draws depend on the whole batch: its seed is
        the first of ``seeds``.
        """
        if not asks:
            return []
        wanted = decoding or self.decoding
        if seeds is not None and wanted.sample:
            torch.manual_seed(seeds[0])
        with _explained_out_of_memory(len(asks)), self._reading():
            inputs = self._inputs(asks)
            ids = self._generate(inputs, wanted)
        start = inputs["input_ids"].shape[1]
        return [self.processor.decode(self._until_end(row[start:].tolist())).strip() for row in ids]

    def stream(self, images: Images, question: str, history: Turns = (), decoding: Decoding | None = None) -> Answer:
        """Answer one question piece by piece, from a thread; see `Generator.stream`."""
        wanted = decoding or self.decoding
        ends = set(self._generation_config(wanted).eos_token_id)
        pieces = TextPieces(lambda ids: self.processor.decode([token for token in ids if token not in ends]))
        with _explained_out_of_memory(1), self._reading():
            inputs = self._inputs([(images, question, history)])

        def generate(streamer: Any, criterion: Any) -> None:
            with _explained_out_of_memory(1):
                self._generate(inputs, wanted, streamer=streamer, stopping_criteria=[criterion])

        return StreamedAnswer(generate, pieces)

    def submit(self, ask: Ask | tuple[Images, str], decoding: Decoding | None = None, seed: int = 0) -> Answer:
        """Add the question to a batch, which is computed when one of its answers is read."""
        if self._batch.answers is not None or len(self._batch.asks) == self.slots:
            self._batch = _Batch([])
        self._batch.asks.append((ask, decoding, seed))
        return _BatchedAnswer(self, self._batch, len(self._batch.asks) - 1)

    def score(self, images: Images, questions: Sequence[ClosedQuestion]) -> list[ChoiceScores]:
        """Closed questions need the model in one place, so this always raises.

        Raises:
            SetupError: always.
        """
        raise closed_questions_refused()

    def compute(self, batch: _Batch) -> list[str]:
        """Compute a batch's answers once."""
        if batch.answers is None:
            asks, decodings, seeds = zip(*batch.asks, strict=True)
            batch.answers = self.answer_batch(asks, decodings[0], seeds)
        return batch.answers

    def _generation_config(self, decoding: Decoding) -> GenerationConfig:
        return decoding.to_generation_config(self.processor.config, self.published)

    def _inputs(self, asks: Sequence[Ask | tuple[Images, str]]) -> dict[str, torch.Tensor]:
        rows: list[dict[str, torch.Tensor]] = []
        shown: list[Shown] = []
        for ask in asks:
            encoded, images, _ = self._asked(ask, None)
            shown += images
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
    def _encoded(self, images: Sequence[Shown]) -> torch.Tensor:
        """Return the tower's output [N, grid * grid, width]; the last batch's images are not computed again."""
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
        """Drop the end token and the padding after it."""
        ends = set(self._generation_config(GREEDY).eos_token_id)
        return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def closed_questions_refused() -> SetupError:
    """Return the error of a model that is spread over devices or processes, or that streams whole layers."""
    return SetupError(
        tr("closed questions are answered by a model on one device"),
        hint=tr("leave out --parallel.tensor and --quant.stream all, and name one --device"),
        code="config-combination",
    )


@dataclass(eq=False)
class _Batch:
    """Questions that are answered together."""

    asks: list[tuple[Any, Decoding | None, int]]
    answers: list[str] | None = field(default=None)


class _BatchedAnswer(Answer):
    def __init__(self, generator: TransformersGenerator, batch: _Batch, place: int) -> None:
        self._generator, self._batch, self._place = generator, batch, place
        self._read = False

    def __next__(self) -> str:
        if self._read:
            raise StopIteration
        self._read = True
        return self._generator.compute(self._batch)[self._place]

    @property
    def done(self) -> bool:
        """Whether its batch was computed."""
        return self._batch.answers is not None

    def stop(self) -> None:
        """Does nothing: no computation runs before an answer is read."""
        self._read = True


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
    """Disable the model's own generation settings inside the block.

    transformers fills what a call leaves open from those settings; cogtune's calls leave some open on purpose (the
    checkpoint's ``max_length``, for example, would count the picture).
    """
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
            tr("out of memory while answering {rows} question{s} at once", rows=rows, s="s" if rows > 1 else ""),
            hint=tr(
                "try {smaller}--quant.experts nf4 --quant.tower nf4, fewer --max-new-tokens, or another --device",
                smaller=smaller,
            ),
        ) from error
