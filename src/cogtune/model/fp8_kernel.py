"""The kernel that rounds rows to fp8, for GPUs with Triton. Imported only there.

One program a row: the row is read once, and its largest value, the scale and the rounded row come from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rows(x, columns, out, scales, width, largest: tl.constexpr, smallest: tl.constexpr, scaled: tl.constexpr,
          block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < width
    value = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        value *= tl.load(columns + place, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(value), 0), smallest) / largest
    rounded = tl.minimum(tl.maximum(value / scale, -largest), largest)
    tl.store(out + row * width + place, rounded.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_on_gpu(
    x: torch.Tensor, column_scale: torch.Tensor | None, form: torch.dtype, largest: float, smallest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [M, I], contiguous, times ``column_scale`` (float32 [I]), in ``form``; and float32 [M, 1] scales.

    ``largest``: of ``form``; ``smallest``: what a row's largest value counts as at least.
    """
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=form, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _rows[(rows,)](
        x, x if column_scale is None else column_scale, out, scales, width, largest=largest, smallest=smallest,
        scaled=column_scale is not None, block=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out, scales
