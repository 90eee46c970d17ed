"""The kernels that round rows to fp8, for GPUs with Triton. Imported only there.

One program a row: the row is read once, and its largest value, the scale and the rounded row come from registers. The
same for what comes before the rounding in an MLP, the activation, and for its gradient, so that an activation is
neither written in 16 bits nor computed twice (a generated kernel reads and computes it once for the largest value and
once more for the rounding, see docs/log.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST = 16384  # values of a row that registers hold


@triton.jit
def _put(value, out, scales, row, place, inside, width, largest: tl.constexpr, smallest: tl.constexpr):
    scale = tl.maximum(tl.max(tl.abs(value), 0), smallest) / largest
    rounded = tl.minimum(tl.maximum(value / scale, -largest), largest)
    tl.store(out + row * width + place, rounded.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _put_fast(value, out, scales, row, place, inside, width, largest: tl.constexpr, smallest: tl.constexpr):
    # one division a row; the conversion itself keeps values to what the format holds
    scale = tl.maximum(tl.max(tl.abs(value), 0), smallest) / largest
    tl.store(out + row * width + place, (value * (1.0 / scale)).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _rows(x, columns, out, scales, width, largest: tl.constexpr, smallest: tl.constexpr, scaled: tl.constexpr,
          block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < width
    value = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        value *= tl.load(columns + place, mask=inside, other=0.0)
    _put(value, out, scales, row, place, inside, width, largest, smallest)


@triton.jit
def _gelu(x, out, scales, width, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < width
    value = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    # x (1 + erf(x / sqrt 2)) / 2, 1 - erf by Abramowitz and Stegun's 7.1.26: off by 4e-7, and fp8 rounds by 6e-2
    size = tl.abs(value)
    z = size * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = tl.maximum(value, 0.0) - 0.5 * size * series * tl.exp(-z * z)
    _put_fast(value, out, scales, row, place, inside, width, largest, smallest)


@triton.jit
def _gated(gate, up, out, scales, width, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < width
    g = tl.load(gate + row * width + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * width + place, mask=inside, other=0.0).to(tl.float32)
    _put_fast(g * tl.sigmoid(g) * u, out, scales, row, place, inside, width, largest, smallest)


@triton.jit
def _gated_gradient(gradient, gate, up, gate_columns, up_columns, gate_out, gate_scales, up_out, up_scales, width,
                    largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < width
    d = tl.load(gradient + row * width + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * width + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * width + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    to_up = d * g * s * tl.load(up_columns + place, mask=inside, other=0.0)
    _put_fast(to_up, up_out, up_scales, row, place, inside, width, largest, smallest)
    to_gate = d * u * s * (1 + g * (1 - s)) * tl.load(gate_columns + place, mask=inside, other=0.0)
    _put_fast(to_gate, gate_out, gate_scales, row, place, inside, width, largest, smallest)


def _outputs(like: torch.Tensor, form: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = like.shape
    return (
        torch.empty(rows, width, dtype=form, device=like.device),
        torch.empty(rows, 1, dtype=torch.float32, device=like.device),
    )


def quantize_on_gpu(
    x: torch.Tensor, column_scale: torch.Tensor | None, form: torch.dtype, largest: float, smallest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [M, I], contiguous, times ``column_scale`` (float32 [I]), in ``form``; and float32 [M, 1] scales.

    ``largest``: of ``form``; ``smallest``: what a row's largest value counts as at least.
    """
    rows, width = x.shape
    out, scales = _outputs(x, form)
    block = triton.next_power_of_2(width)
    _rows[(rows,)](
        x, x if column_scale is None else column_scale, out, scales, width, largest=largest, smallest=smallest,
        scaled=column_scale is not None, block=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out, scales


def gelu_on_gpu(x: torch.Tensor, form: torch.dtype, largest: float, smallest: float) -> tuple[torch.Tensor, ...]:
    """The exact GELU of ``x`` [M, I], contiguous, in ``form``, and float32 [M, 1] scales."""
    rows, width = x.shape
    out, scales = _outputs(x, form)
    _gelu[(rows,)](
        x, out, scales, width, largest=largest, smallest=smallest, block=triton.next_power_of_2(width),
        num_warps=_warps(width, 8),
    )  # fmt: skip
    return out, scales


def gated_on_gpu(
    gate: torch.Tensor, up: torch.Tensor, form: torch.dtype, largest: float, smallest: float
) -> tuple[torch.Tensor, ...]:
    """silu(``gate``) * ``up``, both [M, I] and contiguous, in ``form``, and float32 [M, 1] scales."""
    rows, width = gate.shape
    out, scales = _outputs(gate, form)
    _gated[(rows,)](
        gate, up, out, scales, width, largest=largest, smallest=smallest, block=triton.next_power_of_2(width),
        num_warps=_warps(width, 32),
    )  # fmt: skip
    return out, scales


def gated_gradient_on_gpu(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_columns: torch.Tensor,
    up_columns: torch.Tensor,
    form: torch.dtype,
    largest: float,
    smallest: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``gate`` and ``up`` [M, I], each times its float32 column scales [I], in ``form``, given that of
    silu(``gate``) * ``up``: rounded gate, its scales [M, 1], rounded up, its scales."""
    rows, width = gate.shape
    gate_out, gate_scales = _outputs(gate, form)
    up_out, up_scales = _outputs(up, form)
    _gated_gradient[(rows,)](
        gradient, gate, up, gate_columns, up_columns, gate_out, gate_scales, up_out, up_scales, width, largest=largest,
        smallest=smallest, block=triton.next_power_of_2(width), num_warps=_warps(width, 32),
    )  # fmt: skip
    return gate_out, gate_scales, up_out, up_scales


def _warps(width: int, most: int) -> int:
    """Up to 16 values a thread, and no more than ``most`` warps: the fastest of four at the published width."""
    return min(most, max(1, triton.next_power_of_2(width) // 512))
