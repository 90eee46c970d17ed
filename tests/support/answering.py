"""A generator without a model: its answers tell what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask
from cogtune.generate.stream import Answer, TextPieces
from cogtune.processing.processor import CogVLM2Processor


class FakeGenerator:
    """Answers ``reply(ask)``; ``batches`` holds what it was asked."""

    def __init__(self, checkpoint: Path, reply: Callable[[Ask], str] = lambda ask: f"re {ask[1]}") -> None:
        self.processor = CogVLM2Processor.from_pretrained(checkpoint)
        self.template = None
        self.reply = reply
        self.batches: list[list[Ask]] = []

    def answer_batch(self, asks: Sequence[Ask], decoding: Decoding) -> list[str]:
        self.batches.append(list(asks))
        return [self.reply(ask) for ask in asks]

    def stream(self, image: Any, query: str, history: Any, decoding: Decoding) -> Answer:
        import torch

        self.batches.append([(image, query, list(history))])
        content = self.reply((image, query, history)).encode()

        def generate(streamer: Any, criterion: Any) -> None:
            streamer.put(torch.zeros(1, 3))
            for byte in content:
                if bool(criterion(torch.zeros(1, 1), None)[0]):
                    return
                streamer.put(torch.tensor([byte]))

        return Answer(generate, TextPieces(lambda ids: bytes(ids).decode("utf-8", "replace")))
