"""Prefill of a request's text as CUDA graphs, one per number of rows: the host's launches cost more than the text.

A captured pass serves every slot, length and adapter: what differs is copied into its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogtune.model.extend import extend
from cogtune.model.slots import SlotCache
from cogtune.model.stacked_adapters import StackedAdapters

ROWS = (64, 256)
"""Rows of the captured passes. Up to some 200 rows a product takes the time in which its weight is read."""


class TextGraphs:
    """Captured passes over the slots of ``cache``.

    Args:
        fused: the decode step's embedding and layers.
    """

    def __init__(self, model: Any, cache: SlotCache, fused: Any, adapters: StackedAdapters | None) -> None:
        self._model, self._cache, self._fused, self._adapters = model, cache, fused, adapters
        self._recorded: dict[int, _Recorded] = {}
        self._memory: Any = None

    def rows_for(self, count: int, column: int) -> int | None:
        """Return the rows of the pass that takes ``count`` tokens from ``column`` on, or None if none does."""
        fits = (rows for rows in ROWS if count <= rows and column + rows <= self._cache.columns)
        return next(fits, None)

    def prefill(self, slot: int, tokens: Sequence[int], position: int, column: int, adapter: int) -> torch.Tensor:
        """Append text to a slot, and return the logits behind it, float32 [V]; valid until the next call.

        Args:
            position, column: of the first token; the others follow.
            adapter: index of the adapter that computes.
        """
        rows = self.rows_for(len(tokens), column)
        assert rows is not None
        inputs = self.inputs(rows, slot, tokens, position, column, adapter).pin_memory()
        recorded = self._recorded.get(rows)
        if recorded is None:
            recorded = self._recorded[rows] = self._record(rows, inputs.to(self._cache.keys.device))
        recorded.inputs.copy_(inputs, non_blocking=True)
        recorded.graph.replay()
        return recorded.logits

    def inputs(
        self, rows: int, slot: int, tokens: Sequence[int], position: int, column: int, adapter: int
    ) -> torch.Tensor:
        """Return the inputs of a pass, on the CPU: tokens, positions, columns and adapters, then slot and last row."""
        padding = [0] * (rows - len(tokens))
        numbers = [*tokens, *padding, *range(position, position + rows), *range(column, column + rows)]
        return torch.tensor([*numbers, *[adapter] * rows, slot, len(tokens) - 1])

    def _record(self, rows: int, inputs: torch.Tensor) -> _Recorded:
        """Capture a pass after two warm-up runs on real inputs, which write what the replay writes again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.computed(rows, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = self.computed(rows, inputs)
        self._memory = graph.pool()
        return _Recorded(graph, inputs, logits)

    def computed(self, rows: int, inputs: torch.Tensor) -> torch.Tensor:
        """Compute a pass; returns the logits."""
        tokens, positions, columns, adapters = inputs[: 4 * rows].view(4, rows).unbind()
        slot, last = inputs[4 * rows : 4 * rows + 1], inputs[4 * rows + 1 :]
        fused = self._fused
        given = (self._model, fused.embed, fused.layers, self._cache, slot, tokens, positions, columns, last)
        if self._adapters is None:
            return extend(*given)
        with self._adapters.rows(adapters):
            return extend(*given)


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: torch.Tensor
    logits: torch.Tensor
