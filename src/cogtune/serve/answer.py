"""Answers of the engine's thread in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from cogtune.generate.engine import InferenceEngine
from cogtune.generate.requests import Pending
from cogtune.generate.requests import Request as Question


class Answer:
    """A pending answer whose pieces arrive in the event loop, without a thread per answer."""

    def __init__(self, engine: InferenceEngine, question: Question) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self.first: float | None = None
        self.pending: Pending = engine.submit(question, listener=self._listen)

    def _listen(self, item: str | BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)

    async def pieces(self) -> AsyncIterator[str]:
        """The texts; raises what ended the answer."""
        while True:
            item = await self._pieces.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            if item:
                self.first = self.first or time.perf_counter()
                yield item

    async def text(self) -> str:
        """The whole answer."""
        return "".join([piece async for piece in self.pieces()])


async def forward(number: int, answer: Answer, merged: asyncio.Queue[tuple[int, str | None]]) -> None:
    try:
        async for piece in answer.pieces():
            merged.put_nowait((number, piece))
    finally:
        merged.put_nowait((number, None))
