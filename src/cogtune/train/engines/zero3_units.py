"""What ZeRO-3 gathers in one piece, and how far ahead of the computation.

Left to itself DeepSpeed treats every linear map as a unit: a decoder layer with adapters has some fifty, each with its
own gathering, bookkeeping and waiting, three times a step under recomputation. A layer declared a leaf is fetched once
as a whole, while the layer before it computes.
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
"""Values up to which a weight stays whole on every rank: norms, biases and most adapters. DeepSpeed's own limit of
100,000 lies in the middle of the adapters' sizes, and each one above it would be a gathering of its own."""


def leaf_units(model: nn.Module) -> list[nn.Module]:
    """The units to fetch as wholes.

    DeepSpeed reduces a leaf's gradients when the gradient of its *input* is there, and at once, before there are any,
    where no input has one. So of each stack the first unit that trains stays divided: nothing below it has a gradient.
    """
    leaves: list[nn.Module] = []
    for kind in (PatchEmbedding, VisionLayer, GLUAdapter, DecoderLayer):
        units = [unit for unit in model.modules() if isinstance(unit, kind)]
        first = next((unit for unit in units if any(value.requires_grad for value in unit.parameters())), None)
        leaves += [unit for unit in units if unit is not first]
    return leaves


def fetch_settings(model: nn.Module, leaves: Iterable[nn.Module], whole: int = _PERSISTENT) -> dict[str, int]:
    """DeepSpeed's ``stage3_*`` keys for these leaves: fetch one layer ahead, keep none beyond its use.

    While a layer runs, the next one is being fetched; the head stays gathered from the start of the forward pass to the
    end of the backward pass. ``whole``: the number of values up to which a weight is not partitioned.
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
    """Up to how many values a weight stays whole: as the user's file says, or ours."""
    ours = settings.get("param_persistence_threshold", _PERSISTENT)
    return int(settings.get("stage3_param_persistence_threshold", ours))


def chooses_leaves(settings: dict[str, Any]) -> bool:
    """Whether the user's file says itself what is a unit."""
    names = ("leaf_module", "stage3_module_granularity_threshold", "module_granularity_threshold")
    return any(name in settings for name in names)


def hold_back(leaves: Iterable[nn.Module], device: torch.device) -> None:
    """Keep the host at most a few layers ahead of the device.

    Fetching waits for nothing that the device computes, so a host that runs ahead would have gathered layer after
    layer, none of which the device has used and freed yet.
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
