"""The whole model on every rank, gradients averaged by torch's DistributedDataParallel.

DDP lays its buckets out anew behind the first backward pass, in the order in which gradients came. From three ranks on
a sum depends on where in a bucket a value stands (each part of it is added up beginning with another rank), so a run
that goes on in a new process would round differently than one that never stopped. All gradients are therefore summed
in one piece, in the order of the model's parameters; an adapter's are small.
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
    """Every trainable parameter takes part in every step on every rank (the model sees to it), so nothing is searched
    for unused parameters. Inputs are moved by the loop and rank 0's weights sent by `wrap`, not by DDP."""

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
        """The ranks whose gradients are averaged; None: all."""
        return None

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._ddp.no_sync()


def _average_in_order(parameters: list[nn.Parameter]) -> Callable[[Any, Any], torch.futures.Future[torch.Tensor]]:
    """DDP's hook for a bucket of all gradients: their average over ranks, summed in the order of ``parameters``."""
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

    return lambda group, bucket: average(group, bucket)  # without annotations, of which DDP reads no strings
