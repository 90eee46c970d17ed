"""Prefill of requests' text as CUDA graphs, one per shape: the host's launches cost more than the text.

A captured pass serves every slot, length and adapter: what differs is copied into its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cogtune.model.extend import extend
from cogtune.model.slots import SlotCache
from cogtune.model.stacked_adapters import StackedAdapters

SHAPES = ((1, 64), (4, 64), (1, 256))
"""Slots and tokens of the passes. Up to some 200 tokens a product takes the time in which its weight is read."""


class Text(NamedTuple):
    """Tokens to append to a slot.

    ``position`` and ``length``: the first token's position, and the number of columns that the slot holds. ``adapter``:
    index of the one that computes.
    """

    slot: int
    tokens: Sequence[int]
    position: int
    length: int
    adapter: int


class TextGraphs:
    """Captured passes over the slots of ``cache``.

    Args:
        fused: the decode step's embedding and layers.
    """

    def __init__(self, model: Any, cache: SlotCache, fused: Any, adapters: StackedAdapters | None) -> None:
        self._model, self._cache, self._fused, self._adapters = model, cache, fused, adapters
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._memory: Any = None

    def shape_for(self, counts: Sequence[int]) -> tuple[int, int] | None:
        """Return the shape of the pass that takes texts of so many tokens, or None if none does."""
        fits = (shape for shape in SHAPES if len(counts) <= shape[0] and max(counts) <= shape[1])
        return next(fits, None)

    def groups(self, texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
        """Split texts, in their order, into what a pass takes; what fits in none comes alone."""
        start = 0
        for end in range(1, len(texts) + 1):
            if end == len(texts) or self.shape_for([len(text.tokens) for text in texts[start : end + 1]]) is None:
                yield texts[start:end]
                start = end

    def prefill(self, texts: Sequence[Text]) -> torch.Tensor:
        """Append a text to each of several slots, and return the logits after each, float32 [R, V]; valid until the
        next call.
        """
        shape = self.shape_for([len(text.tokens) for text in texts])
        assert shape is not None
        inputs = self.inputs(shape, texts).pin_memory()
        recorded = self._recorded.get(shape)
        if recorded is None:
            recorded = self._recorded[shape] = self._record(shape, inputs.to(self._cache.keys.device))
        recorded.inputs.copy_(inputs, non_blocking=True)
        recorded.graph.replay()
        return recorded.logits[: len(texts)]

    def inputs(self, shape: tuple[int, int], texts: Sequence[Text]) -> torch.Tensor:
        """Return the inputs of a pass, on the CPU: rows of slot, position, length, adapter, last token and tokens.

        The last text is repeated in the rows that are left: equal rows write equal values to their slot.
        """
        rows, count = shape
        filled = [*texts, *[texts[-1]] * (rows - len(texts))]
        return torch.tensor([
            [text.slot, text.position, text.length, text.adapter, len(text.tokens) - 1, *text.tokens]
            + [0] * (count - len(text.tokens))
            for text in filled
        ])  # fmt: skip

    def _record(self, shape: tuple[int, int], inputs: torch.Tensor) -> _Recorded:
        """Capture a pass after two warm-up runs on real inputs, which write what the replay writes again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.computed(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = self.computed(inputs)
        self._memory = graph.pool()
        return _Recorded(graph, inputs, logits)

    def computed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute a pass; returns the logits [R, V]."""
        slots, positions, lengths, adapters, last = inputs[:, :5].unbind(1)
        tokens = inputs[:, 5:]
        fused = self._fused
        given = (self._model, fused.embed, fused.layers, self._cache, slots, tokens, positions, lengths, last)
        if self._adapters is None:
            return self._model.lm_head(extend(*given)).float()
        with self._adapters.rows(adapters[:, None].expand(tokens.shape).flatten()):
            hidden = extend(*given)
        with self._adapters.rows(adapters):
            return self._model.lm_head(hidden).float()


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: torch.Tensor
    logits: torch.Tensor
