"""Parameters of which this process holds a part, or that hold their values in another form.

ZeRO-3 marks what it has partitioned by attributes of the parameter itself (``ds_id``, ``ds_numel``, ``ds_tensor``).
DeepSpeed has no call that tells the same, and peft and transformers read them too; here is the only place where they
are named.
"""

from __future__ import annotations

from typing import Any

import torch


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has given each rank its shard of it."""
    return hasattr(parameter, "ds_id")


def own_shard(parameter: Any) -> torch.Tensor:
    """This rank's shard, flat, of a parameter that `is_partitioned`."""
    shard: torch.Tensor = parameter.ds_tensor
    return shard


def partitioned_numel(parameter: torch.Tensor) -> int:
    """Elements of all ranks' shards together; of any other parameter those it has."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def note_whole_numel(parameter: torch.Tensor, count: int) -> None:
    """Remember how many values of the model a parameter stands for that is cut or packed."""
    parameter.whole_numel = count  # type: ignore[attr-defined]


def whole_numel(parameter: torch.Tensor) -> int:
    """How many values of the whole model a parameter stands for, whichever part of them lies here."""
    noted: int = getattr(parameter, "whole_numel", parameter.numel())
    return partitioned_numel(parameter) if is_partitioned(parameter) else noted
