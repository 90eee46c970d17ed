"""A generator without a model: its answers tell what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cogtune.generate.generator import Ask
from cogtune.generate.stream import Answer, StreamedAnswer, TextPieces
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.processing.processor import CogVLM2Processor


class FakeGenerator(TransformersGenerator):
    """Answers ``reply(ask)``; ``batches`` holds what it was asked."""

    def __init__(
        self, checkpoint: Path, reply: Callable[[Ask], str] = lambda ask: f"re {ask[1]}", slots: int = 2
    ) -> None:
        super().__init__(
            SimpleNamespace(generation_config=None), CogVLM2Processor.from_pretrained(checkpoint), slots=slots
        )
        self.reply = reply
        self.batches: list[list[Ask]] = []

    def answer_batch(self, asks: Sequence[Ask], decoding: Any = None, seeds: Any = None) -> list[str]:
        self.batches.append(list(asks))
        return [self.reply(ask) for ask in asks]

    def stream(self, images: Any, question: str, history: Any = (), decoding: Any = None) -> Answer:
        import torch

        self.batches.append([(images, question, list(history))])
        content = self.reply((images, question, history)).encode()

        def generate(streamer: Any, criterion: Any) -> None:
            streamer.put(torch.zeros(1, 3))
            for byte in content:
                if bool(criterion(torch.zeros(1, 1), None)[0]):
                    return
                streamer.put(torch.tensor([byte]))

        return StreamedAnswer(generate, TextPieces(lambda ids: bytes(ids).decode("utf-8", "replace")))
