"""What the engine computes: the beginnings of requests in slots, and steps over those slots.

Nothing here knows of queues and answers. So the ranks of a tensor-parallel model compute it together
(`generate.lockstep`): the first one's engine says what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cogtune.errors import OutOfMemoryError
from cogtune.generate.decode_steps import Begun, DecodeSteps, captures
from cogtune.generate.picture_cache import PictureCache, default_budget
from cogtune.generate.prefill import Placed, Prefill
from cogtune.generate.requests import Request
from cogtune.language import tr
from cogtune.model.layer_streaming import is_streamed
from cogtune.model.slots import SlotCache
from cogtune.model.stacked_adapters import StackedAdapters
from cogtune.processing.processor import CogVLM2Processor


class SlotWork:
    """Prefill and decode steps of ``model`` over slots that grow.

    Args:
        picture_budget, graphs, adapters: as for `InferenceEngine`.

    Attributes:
        cache, steps: None before the first `room`.
        failed: why ranks no longer compute together; None: they do, or there is one.
    """

    def __init__(
        self,
        model: Any,
        processor: CogVLM2Processor,
        *,
        picture_budget: int | None = None,
        graphs: bool | None = None,
        adapters: StackedAdapters | None = None,
    ) -> None:
        self.model, self.adapters = model, adapters
        self.cache: SlotCache | None = None
        self.steps: DecodeSteps | None = None
        self.failed: BaseException | None = None
        self._graphs = captures(model) if graphs is None else graphs
        host = is_streamed(model)
        budget = default_budget(model.device, host) if picture_budget is None else picture_budget
        self.pictures = PictureCache(budget, host)
        self.prefill = Prefill(model, processor, self.pictures, adapters)

    def room(self, slots: int, columns: int) -> None:
        """Create the slots, or let them grow."""
        if self.cache is None or self.steps is None:
            cache = SlotCache.of(self.model, slots, columns)
            self.steps = DecodeSteps(self.model, cache, graphs=self._graphs, adapters=self.adapters)
        else:
            cache = self.cache.resized(slots, columns)
            self.steps.use(cache)
        self.cache = cache  # only now: without memory for all of it, there are no more slots than before

    def begin(self, requests: Sequence[Request], slots: Sequence[int]) -> torch.Tensor:
        """Prefill requests in their slots, and return their first tokens [R] on the device."""
        assert self.cache is not None
        assert self.steps is not None
        placed = [
            Placed(request, slot, self.prefill.adapter(request.adapter))
            for request, slot in zip(requests, slots, strict=True)
        ]
        logits, ends = self.prefill.fill(placed, self.cache, self.steps.text)
        begun = [
            Begun(slot, *end, request.decoding, request.seed, adapter)
            for (request, slot, adapter), end in zip(placed, ends, strict=True)
        ]
        return self.steps.begin(logits, begun)

    def step(self, slots: list[int], sample: bool) -> torch.Tensor:
        """Return the next token of each slot [R] on the device; see `DecodeSteps.step`."""
        assert self.steps is not None
        return self.steps.step(slots, sample)


def explained(error: BaseException, rows: int, hint: str | None = None) -> BaseException:
    """Return ``error``, or for a full device one that says what can be done.

    Args:
        rows: answers at once.
        hint: what can be done; None: as for a model on one device.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return OutOfMemoryError(
            tr("out of memory while answering {rows} question{s} at once", rows=rows, s="s" if rows > 1 else ""),
            hint=hint
            or tr(
                "try fewer at once (--batch-size; of a server --slots), or weights in fewer bits: --quant.experts nf4"
                " --quant.tower nf4"
            ),
        )
    return error
