"""What ZeRO-3 all-gathers in one piece, and how far ahead of the computation.

By default DeepSpeed treats every linear layer as a unit. A decoder layer with adapters has some fifty, each with its
own all-gather, bookkeeping and synchronisation, three times per step under activation checkpointing. A layer declared a
leaf module is gathered once as a whole, prefetched while the previous layer computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from cogtune.distributed.buffers import ZERO3_LAYERS_AHEAD
from cogtune.distributed.shards import partitioned_numel
from cogtune.model.modeling import DecoderLayer
from cogtune.model.vision import GLUAdapter, PatchEmbedding, VisionLayer

_PERSISTENT = 2**20
"""Weights with up to this many values are replicated on every rank: norms, biases and most adapters. DeepSpeed's
default of 100,000 is in the middle of the adapters' sizes, and each one above it would be an all-gather of its own."""


def leaf_units(model: nn.Module) -> list[nn.Module]:
    """Return the units to gather as a whole.

    DeepSpeed reduces a leaf's gradients when the gradient of its *input* arrives. If no input has one, it does so at
    once, before there are any gradients. So the first unit of each stack that trains is not a leaf: nothing below it
    has a gradient.
    """
    leaves: list[nn.Module] = []
    for kind in (PatchEmbedding, VisionLayer, GLUAdapter, DecoderLayer):
        units = [unit for unit in model.modules() if isinstance(unit, kind)]
        first = next((unit for unit in units if any(value.requires_grad for value in unit.parameters())), None)
        leaves += [unit for unit in units if unit is not first]
    return leaves


def fetch_settings(model: nn.Module, leaves: Iterable[nn.Module], whole: int = _PERSISTENT) -> dict[str, int]:
    """Return DeepSpeed's ``stage3_*`` keys for these leaves: prefetch one layer, free each one after its use.

    While a layer runs, the next one is gathered. The head stays gathered from the start of the forward pass to the end
    of the backward pass. ``whole``: the number of values up to which a weight is not partitioned.
    """
    largest = max((sum(size for size in _sizes(leaf) if size > whole) for leaf in leaves), default=0)
    rest = max(
        (partitioned_numel(value) for name, value in model.named_parameters() if name.endswith("lm_head.weight")),
        default=0,
    )
    return {
        "stage3_param_persistence_threshold": whole,
        "stage3_prefetch_bucket_size": max(largest, 1),
        "stage3_max_live_parameters": 2 * largest + rest,
        "stage3_max_reuse_distance": 0,
    }


def persistent_values(settings: dict[str, Any]) -> int:
    """Return up to how many values a weight is replicated: the user's setting, or ours."""
    ours = settings.get("param_persistence_threshold", _PERSISTENT)
    return int(settings.get("stage3_param_persistence_threshold", ours))


def chooses_leaves(settings: dict[str, Any]) -> bool:
    """Return whether the user's file defines the units itself."""
    names = ("leaf_module", "stage3_module_granularity_threshold", "module_granularity_threshold")
    return any(name in settings for name in names)


def hold_back(leaves: Iterable[nn.Module], device: torch.device) -> None:
    """Limit how many layers the host may enqueue ahead of the device.

    All-gathers do not wait for the device's computation. Without a limit, a host that runs ahead would have gathered
    layer after layer, none of which the device has used and freed yet.
    """
    if device.type != "cuda":
        return
    queued: deque[torch.cuda.Event] = deque()

    def wait(*_: Any) -> None:
        event = torch.cuda.Event()
        event.record()
        queued.append(event)
        if len(queued) > ZERO3_LAYERS_AHEAD:
            queued.popleft().synchronize()

    for leaf in leaves:
        leaf.register_forward_pre_hook(wait)
        leaf.register_full_backward_pre_hook(wait)


def _sizes(unit: nn.Module) -> Iterator[int]:
    return (partitioned_numel(value) for value in unit.parameters())
