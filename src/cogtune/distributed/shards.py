"""Sharded and packed parameters: what part of a parameter this process holds, and how many values the whole has.

ZeRO-3 marks parameters that it has partitioned with attributes (``ds_id``, ``ds_numel``, ``ds_tensor``). DeepSpeed has
no public function for the same; peft and transformers read these attributes too. Only this module names them.
"""

from __future__ import annotations

from typing import Any

import torch


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 has partitioned ``parameter`` over the ranks.

    A partitioned parameter's own data is empty until it is all-gathered, so its shape and ``numel()`` say nothing.
    """
    return hasattr(parameter, "ds_id")


def own_shard(parameter: Any) -> torch.Tensor:
    """Return this rank's flat shard of a partitioned parameter."""
    shard: torch.Tensor = parameter.ds_tensor
    return shard


def partitioned_numel(parameter: torch.Tensor) -> int:
    """Return the number of elements of all ranks' shards together, or of the parameter itself if it is not
    partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def note_whole_numel(parameter: torch.Tensor, count: int) -> None:
    """Record how many values of the whole model a sharded or packed parameter stands for."""
    parameter.whole_numel = count  # type: ignore[attr-defined]


def whole_numel(parameter: torch.Tensor) -> int:
    """Return how many values of the whole model a parameter stands for, however much of it this process holds."""
    # tensor parallelism and 4-bit packing record the count; ZeRO-3 keeps it in an attribute of its own
    noted: int = getattr(parameter, "whole_numel", parameter.numel())
    return partitioned_numel(parameter) if is_partitioned(parameter) else noted
