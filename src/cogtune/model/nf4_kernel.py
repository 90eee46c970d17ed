"""The kernel that makes a weight of bitsandbytes' NF4 storage, for GPUs with Triton. Imported only there.

One pass: codes, scales, and the scales' own scales are read once, and the weight is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_GROUPS = 64  # blocks of values a program makes: 64 blocks of 64 are 2 KB of codes and 8 KB of weight


@triton.jit
def _nested(packed, absmax, code, outer_absmax, outer_code, offset, out, blocks, outer: tl.constexpr,
            half: tl.constexpr, groups: tl.constexpr):  # fmt: skip
    block = tl.program_id(0) * groups + tl.arange(0, groups)
    inside = block < blocks
    step = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(outer_code + step) * tl.load(outer_absmax + block // outer, mask=inside, other=0.0)
    _write(packed, code, out, block, inside, scale + tl.load(offset), half)


@triton.jit
def _plain(packed, absmax, code, out, blocks, half: tl.constexpr, groups: tl.constexpr):
    block = tl.program_id(0) * groups + tl.arange(0, groups)
    inside = block < blocks
    _write(packed, code, out, block, inside, tl.load(absmax + block, mask=inside, other=0.0), half)


@triton.jit
def _write(packed, code, out, block, inside, scale, half: tl.constexpr):
    start = block.to(tl.int64)[:, None] * half
    both = tl.load(packed + start + tl.arange(0, half)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    upper = tl.load(code + (both >> 4)) * scale[:, None]
    lower = tl.load(code + (both & 15)) * scale[:, None]
    values = tl.interleave(upper, lower).to(out.dtype.element_ty)
    tl.store(out + 2 * start + tl.arange(0, 2 * half)[None, :], values, mask=inside[:, None])


def dequantize_nf4(
    packed: torch.Tensor, state: tuple[Any, ...], rows: int, columns: int, blocksize: int, outer_blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The weight [rows, columns] in ``dtype``, to the bit what bitsandbytes makes of the same storage.

    ``packed``: uint8, rows * columns / 2 of them; ``state``: scales of the blocks (float32, or uint8 with scales of
    their own), code, and for the latter the outer scales, the outer code and the offset, else None.
    """
    absmax, code, outer_absmax, outer_code, offset = state
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    blocks = rows * columns // blocksize
    grid = (triton.cdiv(blocks, _GROUPS),)
    if outer_absmax is None:
        _plain[grid](packed, absmax, code, out, blocks, half=blocksize // 2, groups=_GROUPS)
    else:
        _nested[grid](packed, absmax, code, outer_absmax, outer_code, offset, out, blocks, outer=outer_blocksize,
                      half=blocksize // 2, groups=_GROUPS)  # fmt: skip
    return out
