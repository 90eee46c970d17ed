"""All-reduce of gradients in buckets: many small tensors in one collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from cogtune.distributed.buffers import SUM_BUCKET


def sum_in_buckets(tensors: Iterable[torch.Tensor], process_group: Any = None, *, factor: float = 1.0) -> None:
    """Replace each tensor in place by ``factor`` times its sum over the ranks of ``process_group`` (None: all).

    The sum is in each tensor's own dtype. Collective: every rank passes tensors of the same shapes in the same order.
    """
    if dist.get_world_size(process_group) == 1:
        return
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= SUM_BUCKET:
            _sum_bucket(bucket, process_group, factor)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket, process_group, factor)


def _sum_bucket(bucket: list[torch.Tensor], process_group: Any, factor: float) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat, group=process_group)
    if factor != 1.0:
        flat.mul_(factor)
    for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))
