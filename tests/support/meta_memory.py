"""What a forward and backward pass would hold, found by running the real code on the meta device at full size.

Tensors there have sizes and no content, so 19.5 B parameters cost nothing. Every storage that an operation makes is
counted from its creation to its last reference; what a kernel takes for itself is not seen. Attention goes to flash
attention's own operator, because on the meta device the choice would fall on the one that writes out all scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # the CUDA allocator rounds every request up to this


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside it: ``live`` now, ``peak`` since the last `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Storages that were there before: weights and inputs."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def reset(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                self._take(value.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._ignored:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)


@contextmanager
def gpu_operators() -> Iterator[None]:
    """Within it, attention is a fused operator (with a mask cuDNN's) and dropout the one with a byte mask, as on a
    GPU."""
    attention, dropout = functional.scaled_dot_product_attention, functional.dropout

    def flash(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> torch.Tensor:
        if attn_mask is not None:
            return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, True, 0.0, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    def fused(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0]

    functional.scaled_dot_product_attention, functional.dropout = flash, fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = attention, dropout
