"""The loss: the sum over supervised tokens, divided by a count the caller may set to that of the global batch."""

from __future__ import annotations

import torch
from torch.nn import functional


def token_loss(logits_MV: torch.Tensor, targets_M: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Cross entropy in float32: sum over M targets divided by ``num_items``, or by M itself (a token mean).

    With no target at all the result is 0 and still carries a graph, so that every rank can run its backward.
    """
    total = functional.cross_entropy(logits_MV.float(), targets_M, reduction="sum")
    if num_items is None:
        return total / max(targets_M.shape[0], 1)
    return total / num_items
