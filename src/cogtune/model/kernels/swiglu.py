"""Fused SwiGLU product whose inputs have low-rank updates, for GPUs with Triton. Imported only there.

A tile of each input is read once, and its low-rank update is computed in registers, so the updated inputs are never
written to memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FORWARD_TILE, _BACKWARD_TILE = (64, 64), (32, 64)  # rows, columns: the fastest of nine on an H200 (docs/log.md)


@triton.jit
def _product(small, matrix, at_row, at_column, in_rows, in_columns, stride: tl.constexpr, rank: tl.constexpr,
             block: tl.constexpr):  # fmt: skip
    """Return a float32 tile of ``small matrix'``: R columns of small (row stride ``stride``) and matrix [I, R]."""
    r = tl.arange(0, block)
    s = tl.load(small + at_row[:, None] * stride + r[None, :], mask=in_rows[:, None] & (r < rank)[None, :], other=0.0)
    there = in_columns[None, :] & (r < rank)[:, None]
    m = tl.load(matrix + at_column[None, :] * rank + r[:, None], mask=there, other=0.0)
    return tl.dot(s, m, input_precision="ieee")


@triton.jit
def _tile(row_block: tl.constexpr, column_block: tl.constexpr):
    """Return this program's rows and columns."""
    at_row = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    return at_row, tl.program_id(1) * column_block + tl.arange(0, column_block)


@triton.jit
def _inputs(gate, up, small, gate_matrix, up_matrix, place, inside, at_row, at_column, rows, width,
            gate_rank: tl.constexpr, gate_block: tl.constexpr, up_rank: tl.constexpr,
            up_block: tl.constexpr):  # fmt: skip
    """Return float32 tiles of silu's input and of its factor."""
    in_rows, in_columns = at_row < rows, at_column < width
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    g += _product(small, gate_matrix, at_row, at_column, in_rows, in_columns, gate_rank + up_rank, gate_rank,
                  gate_block)  # fmt: skip
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    u += _product(small + gate_rank, up_matrix, at_row, at_column, in_rows, in_columns, gate_rank + up_rank, up_rank,
                  up_block)  # fmt: skip
    return g, u


@triton.jit
def _forward(gate, up, small, gate_matrix, up_matrix, out, rows, width, gate_rank: tl.constexpr,
             gate_block: tl.constexpr, up_rank: tl.constexpr, up_block: tl.constexpr, row_block: tl.constexpr,
             column_block: tl.constexpr):  # fmt: skip
    at_row, at_column = _tile(row_block, column_block)
    place = at_row[:, None] * width + at_column[None, :]
    inside = (at_row < rows)[:, None] & (at_column < width)[None, :]
    g, u = _inputs(gate, up, small, gate_matrix, up_matrix, place, inside, at_row, at_column, rows, width,
                   gate_rank, gate_block, up_rank, up_block)  # fmt: skip
    tl.store(out + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gradient, down_small, down_matrix, gate, up, small, gate_matrix, up_matrix, gate_out, up_out, rows,
              width, joined: tl.constexpr, down_rank: tl.constexpr, down_block: tl.constexpr, gate_rank: tl.constexpr,
              gate_block: tl.constexpr, up_rank: tl.constexpr, up_block: tl.constexpr, row_block: tl.constexpr,
              column_block: tl.constexpr):  # fmt: skip
    at_row, at_column = _tile(row_block, column_block)
    place = at_row[:, None] * width + at_column[None, :]
    inside = (at_row < rows)[:, None] & (at_column < width)[None, :]
    d = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if joined:
        r = tl.arange(0, down_block)
        s = tl.load(down_small + at_row[:, None] * down_rank + r[None, :],
                    mask=(at_row < rows)[:, None] & (r < down_rank)[None, :], other=0.0)  # fmt: skip
        m = tl.load(down_matrix + r[:, None] * width + at_column[None, :],
                    mask=(r < down_rank)[:, None] & (at_column < width)[None, :], other=0.0)  # fmt: skip
        d += tl.dot(s, m, input_precision="ieee")
    g, u = _inputs(gate, up, small, gate_matrix, up_matrix, place, inside, at_row, at_column, rows, width,
                   gate_rank, gate_block, up_rank, up_block)  # fmt: skip
    sigmoid = tl.sigmoid(g)
    tl.store(up_out + place, (d * g * sigmoid).to(up_out.dtype.element_ty), mask=inside)
    to_gate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(gate_out + place, to_gate.to(gate_out.dtype.element_ty), mask=inside)


def _block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))  # tl.dot needs at least 16


def product_on_gpu(
    gate: torch.Tensor, up: torch.Tensor, small: torch.Tensor, gate_matrix: torch.Tensor, up_matrix: torch.Tensor
) -> torch.Tensor:
    """Return silu(gate + gate_small gate_matrix') * (up + up_small up_matrix') [M, I]. All inputs are contiguous and
    share one dtype; matrices are [I, R]; ``small`` holds the columns of gate_small [M, R], then those of up_small."""
    rows, width = gate.shape
    out = torch.empty_like(gate)
    down, across = _FORWARD_TILE
    _forward[(-(-rows // down), -(-width // across))](
        gate, up, small, gate_matrix, up_matrix, out, rows, width,
        gate_rank=gate_matrix.shape[1], gate_block=_block(gate_matrix.shape[1]),
        up_rank=up_matrix.shape[1], up_block=_block(up_matrix.shape[1]),
        row_block=down, column_block=across, num_warps=8,
    )  # fmt: skip
    return out


def gradients_on_gpu(
    gradient: torch.Tensor,
    down_small: torch.Tensor | None,
    down_matrix: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    small: torch.Tensor,
    gate_matrix: torch.Tensor,
    up_matrix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up [M, I]. The product's gradient is ``gradient`` + down_small [M, R]
    down_matrix [R, I], or ``gradient`` alone."""
    rows, width = gate.shape
    gate_out, up_out = torch.empty_like(gate), torch.empty_like(up)
    down, across = _BACKWARD_TILE
    joined = down_small is not None and down_matrix is not None
    rank = down_matrix.shape[0] if down_matrix is not None else 1
    _backward[(-(-rows // down), -(-width // across))](
        gradient, down_small if joined else gradient, down_matrix if joined else gradient, gate, up, small, gate_matrix,
        up_matrix, gate_out, up_out, rows, width, joined=joined, down_rank=rank, down_block=_block(rank),
        gate_rank=gate_matrix.shape[1], gate_block=_block(gate_matrix.shape[1]),
        up_rank=up_matrix.shape[1], up_block=_block(up_matrix.shape[1]),
        row_block=down, column_block=across, num_warps=8,
    )  # fmt: skip
    return gate_out, up_out
