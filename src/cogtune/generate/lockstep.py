"""Ranks that share a tensor-parallel model compute in lockstep: the first one's engine decides, all do the same.

The first rank broadcasts every call of `SlotWork` before it makes it (over gloo, without waiting for a GPU); the others
repeat it on their shards of weights, keys and values. What they keep of pictures is kept and evicted alike, and a token
is the first rank's choice (`TensorGroup.agree`), so nothing else has to be exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from cogtune.distributed.lost_peers import explain_peers
from cogtune.generate.picture_cache import default_budget
from cogtune.generate.requests import Request
from cogtune.generate.slot_work import SlotWork, explained
from cogtune.language import tr
from cogtune.model.layer_streaming import is_streamed
from cogtune.processing.processor import CogVLM2Processor


class LeadingWork(SlotWork):
    """The first rank's work, which the other ranks repeat in `follow`."""

    def __init__(
        self,
        model: Any,
        processor: CogVLM2Processor,
        *,
        picture_budget: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        # one budget for all: what one rank forgets and another keeps, they would not compute together
        budget = default_budget(model.device, is_streamed(model)) if picture_budget is None else picture_budget
        announced({"picture_budget": budget, "graphs": graphs})
        super().__init__(model, processor, picture_budget=budget, graphs=graphs)

    def room(self, slots: int, columns: int) -> None:
        with self._together(slots, "room", slots, columns):
            super().room(slots, columns)

    def begin(self, requests: Sequence[Request], slots: Sequence[int]) -> torch.Tensor:
        # a picture that cannot be resized fails here, before the others wait for it
        sent = self.prefill.with_pixels(requests)
        with self._together(len(slots), "begin", sent, slots):
            return super().begin(sent, slots)

    def step(self, slots: list[int], sample: bool) -> torch.Tensor:
        with self._together(len(slots), "step", slots, sample):
            return super().step(slots, sample)

    @contextmanager
    def _together(self, rows: int, name: str, *arguments: Any) -> Iterator[None]:
        if self.failed is not None:
            raise self.failed
        try:
            with explaining(rows):
                announced({"rows": rows, "name": name, "arguments": arguments})
                yield
        except BaseException as error:
            self.failed = error  # the others may be past it, or in the middle
            raise


@torch.no_grad()
def follow(model: Any, processor: CogVLM2Processor) -> None:
    """Repeat what the first rank computes until it is done.

    Raises:
        RunError: another rank ended. OutOfMemoryError: this one's device is too small.
    """
    settings = announced(None)
    if settings is None:
        return
    work = SlotWork(model, processor, **settings)
    while (call := announced(None)) is not None:
        with explaining(call["rows"]):
            getattr(work, call["name"])(*call["arguments"])


def announced(call: dict[str, Any] | None) -> dict[str, Any] | None:
    """Broadcast the first rank's ``call`` to every rank; None: it is done.

    Raises:
        RunError: another rank ended.
    """
    message = [call]
    with explaining(0):
        dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    return message[0]


@contextmanager
def explaining(rows: int) -> Iterator[None]:
    """Say of other ranks that are gone, and of a device that is full, what can be done. ``rows``: answers at once.

    Raises:
        RunError, OutOfMemoryError: instead of torch's errors.
    """
    try:
        yield
    except RuntimeError as error:
        smaller = tr("try fewer at once (--batch-size), or more cards: a larger --parallel.tensor")
        found = explain_peers(error, logs=False) or explained(error, rows, smaller)
        if found is error:
            raise
        raise found from error
