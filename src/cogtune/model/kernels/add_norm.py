"""The kernel that normalises a sublayer's output and adds it to the stream, for GPUs with Triton. Imported only there.

One program a row, which stays in registers: two rows are read once and one is written. A generated kernel goes over a
row of the tower's width twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST = 8192  # values of a row


@triton.jit
def _add_norm(x, update, weight, bias, out, width, eps: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, block)
    inside = place < width
    value = tl.load(update + row + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    normed = centred * scale * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    normed += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(x + row + place, mask=inside, other=0.0).to(tl.float32) + normed
    tl.store(out + row + place, total.to(out.dtype.element_ty), mask=inside)


def add_norm_on_gpu(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """``x`` + LayerNorm(``update``), both [M, W] and contiguous."""
    rows, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](x, update, weight, bias, out, width, eps=eps, block=block, num_warps=max(1, block // 512))
    return out
