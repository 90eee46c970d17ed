"""The whole model on every rank, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers; 2.11 knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                model, broadcast_buffers=False, init_sync=False, process_group=self._ddp_group()
            )
        return self._ddp

    def _ddp_group(self) -> Any:
        """The ranks whose gradients are averaged; None: all."""
        return None

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._ddp.no_sync()
