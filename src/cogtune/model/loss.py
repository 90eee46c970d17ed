"""The loss: a sum over supervised tokens, divided by a count that the caller may set to that of the global batch.

Shapes: M targets, D hidden, V vocabulary. In training only the logits of a few hundred tokens exist at a time. For a
frozen head the gradient is computed in the forward pass, chunk by chunk, and only its [M, D] result is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cogtune.configuration.shapes import LOSS_CHUNK


def token_loss(logits_MV: torch.Tensor, targets_M: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Return the float32 cross entropy, summed over M targets and divided by ``num_items``, or by M itself (a token
    mean).

    Without targets the result is 0 and still has a graph, so that every rank can run its backward pass.
    """
    return _averaged(_summed(logits_MV, targets_M), targets_M, num_items)


def head_loss(
    head: nn.Module,
    vocab_size: int,
    hidden_MD: torch.Tensor,
    targets_M: torch.Tensor,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    """Compute ``token_loss(head(hidden), ...)`` without materialising all logits at once.

    A head that is trained, adapted, quantised or sharded is called as a module. Above ``LOSS_CHUNK`` targets its logits
    are recomputed in the backward pass.
    """
    if isinstance(head, nn.Linear) and _is_plain(head, vocab_size, hidden_MD):
        total: torch.Tensor = _FrozenHeadLoss.apply(hidden_MD, head.weight, targets_M)
    elif hidden_MD.shape[0] <= LOSS_CHUNK:
        total = _summed(head(hidden_MD), targets_M)
    else:
        chunks = zip(hidden_MD.split(LOSS_CHUNK), targets_M.split(LOSS_CHUNK), strict=True)
        total = torch.stack([checkpoint(_chunk, head, h, t, use_reentrant=False) for h, t in chunks]).sum()
    return _averaged(total, targets_M, num_items)


def _averaged(total: torch.Tensor, targets_M: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    return total / (max(targets_M.shape[0], 1) if num_items is None else num_items)


def _summed(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_MV.float(), targets_M, reduction="sum")


def _chunk(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _summed(head(hidden), targets)


def _is_plain(head: nn.Linear, vocab_size: int, hidden: torch.Tensor) -> bool:
    """Return whether the head is a plain weight: whole, frozen, without bias and in the dtype of the hidden states."""
    weight, shape = head.weight, (vocab_size, hidden.shape[-1])
    whole = type(head) is nn.Linear and type(weight) is nn.Parameter and weight.shape == shape
    return whole and head.bias is None and not weight.requires_grad and weight.dtype == hidden.dtype


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed loss of a frozen head, with the hidden states' gradient computed in the forward pass.

    That gradient belongs to the sum. The incoming gradient (1 / count, a loss scale) multiplies it in float32 in the
    backward pass, so a small factor underflows no earlier than without this function.
    """

    @staticmethod
    def forward(ctx: Any, hidden_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        gradients = []
        for hidden, targets in zip(hidden_MD.split(LOSS_CHUNK), targets_M.split(LOSS_CHUNK), strict=True):
            added, gradient = _FrozenHeadLoss._chunk(hidden, weight_VD, targets, ctx.needs_input_grad[0])
            total += added
            gradients += gradient
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def _chunk(
        hidden: torch.Tensor, weight_VD: torch.Tensor, targets: torch.Tensor, needed: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the summed loss of some tokens and, if needed, its gradient for them. Holds two arrays of logits at
        most."""
        logits = functional.linear(hidden, weight_VD).float()
        total = functional.cross_entropy(logits, targets, reduction="sum")
        if not needed:
            return total, []
        probabilities = logits.softmax(-1)
        del logits
        probabilities[torch.arange(targets.shape[0], device=targets.device), targets] -= 1
        return total, [probabilities.to(hidden.dtype) @ weight_VD]

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * outer).to(gradient.dtype), None, None
