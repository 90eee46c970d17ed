"""Data parallelism: the whole model on every rank, gradients averaged by torch's DistributedDataParallel.

After the first backward pass, DDP rebuilds its buckets in the order in which gradients arrived. With three or more
ranks, the rounding of a ring all-reduce depends on a value's offset in its bucket, so a resumed run would round
differently than an uninterrupted one. Therefore all gradients are all-reduced in one bucket, in the order of the
model's parameters; an adapter's gradients are small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cogtune.train.engines.single import SingleEngine


class DdpEngine(SingleEngine):
    """Every trainable parameter receives a gradient in every step on every rank (the model guarantees it), so DDP does
    not search for unused parameters. The loop moves inputs to the device and `wrap` broadcasts rank 0's weights."""

    name = "ddp"

    def _wrap(self, model: nn.Module) -> nn.Module:
        super()._wrap(model)
        assert dist.is_initialized(), "DDP without a process group would train alone"
        trained = list(self.parameters.values())
        mebibytes = sum(value.numel() * value.element_size() for value in trained) / 2**20
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers; 2.11 knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                init_sync=False,
                process_group=self._ddp_group(),
                bucket_cap_mb=int(mebibytes) + 1,
            )
        self._ddp.register_comm_hook(self._ddp_group(), _average_in_order(trained))
        return self._ddp

    def _ddp_group(self) -> Any:
        """Return the process group over which gradients are averaged; None: all ranks."""
        return None

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._ddp.no_sync()


def _average_in_order(parameters: list[nn.Parameter]) -> Callable[[Any, Any], torch.futures.Future[torch.Tensor]]:
    """Return DDP's communication hook for a single bucket: the average over ranks, reduced in the order of
    ``parameters``."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def average(group: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        named = zip(bucket.parameters(), bucket.gradients(), strict=True)
        gradients = [gradient for _, gradient in sorted(named, key=lambda pair: places[id(pair[0])])]
        assert len(gradients) == len(places), f"DDP made a bucket of {len(gradients)} of {len(places)} gradients"
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size(group))

        def put_back(_: Any) -> torch.Tensor:
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))
            whole: torch.Tensor = bucket.buffer()
            return whole

        sent: torch.futures.Future[Any] = dist.all_reduce(flat, group=group, async_op=True).get_future()
        return sent.then(put_back)

    return lambda group, bucket: average(group, bucket)  # DDP checks annotations and rejects postponed (string) ones
