"""The whole model on every rank, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cogtune.train.engines.single import SingleEngine


class DdpEngine(SingleEngine):
    """Every trainable parameter takes part in every step on every rank (the model sees to it), so nothing is searched
    for unused parameters. Inputs are moved by the loop and rank 0's weights sent by `wrap`, not by DDP."""

    name: ClassVar[str] = "ddp"

    def _wrap(self, model: nn.Module) -> nn.Module:
        super()._wrap(model)
        assert dist.is_initialized(), "DDP without a process group would train alone"
        self._ddp = DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)
        return self._ddp

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._ddp.no_sync()
