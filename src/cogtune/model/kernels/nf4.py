"""Dequantisation of bitsandbytes' 4-bit weights (NF4, FP4), for GPUs with Triton. Imported only there.

One pass: codes, scales and the scales' own scales are read once, and the weight is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_GROUPS = 64  # blocks per program: 64 blocks of 64 values are 2 KB of codes and 8 KB of weight


@triton.jit
def _kernel(packed, absmax, code, outer_absmax, outer_code, offset, out, blocks, outer: tl.constexpr,
            half: tl.constexpr, groups: tl.constexpr, nested: tl.constexpr, use: tl.constexpr):  # fmt: skip
    # `use` changes nothing: it keeps the compiler from saving the forward pass's weight for the backward pass
    block = tl.program_id(0) * groups + tl.arange(0, groups)
    inside = block < blocks
    if nested:
        step = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(outer_code + step) * tl.load(outer_absmax + block // outer, mask=inside, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    start = block.to(tl.int64)[:, None] * half
    both = tl.load(packed + start + tl.arange(0, half)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    upper = tl.load(code + (both >> 4)) * scale[:, None]
    lower = tl.load(code + (both & 15)) * scale[:, None]
    values = tl.interleave(upper, lower).to(out.dtype.element_ty)
    tl.store(out + 2 * start + tl.arange(0, 2 * half)[None, :], values, mask=inside[:, None])


def dequantize_nf4(
    packed: torch.Tensor, state: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype, use: int = 0
) -> torch.Tensor:
    """Return the weight [rows, columns] in ``dtype``, bit-identical to bitsandbytes' dequantisation.

    ``packed``: uint8, rows * columns / 2 of them; ``state``: scales of the blocks (float32, or uint8 with scales of
    their own), code, and for the latter the outer scales, the outer code and the offset, else None. ``sizes``: rows,
    columns, values of a block, blocks of an outer one; what follows is not read. Calls of another ``use`` are kept
    apart by a compiler.
    """
    absmax, code, outer_absmax, outer_code, offset = state
    rows, columns, blocksize, outer_blocksize = sizes[:4]
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    blocks = rows * columns // blocksize
    nested = outer_absmax is not None
    _kernel[(-(-blocks // _GROUPS),)](
        packed, absmax, code, outer_absmax if nested else absmax, outer_code if nested else code,
        offset if nested else code, out, blocks, outer=outer_blocksize, half=blocksize // 2, groups=_GROUPS,
        nested=nested, use=use,
    )  # fmt: skip
    return out
