"""Rotary position embedding, in the precision of the checkpoint.

Shapes: B rows, S columns, H heads, E head width.

The published model computes position, angle, cosine and sine in the dtype of ``inv_freq`` (bfloat16 as shipped), so
integers above 256 collide; this is part of its behaviour. `tests/parity/test_golden.py` holds the tables to the bit.
"""

from __future__ import annotations

import torch
from torch import nn

from cogtune.model.compiler_workarounds import cast_unless_same


def inverse_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> torch.Tensor:
    """Return ``theta^(-2i/head_dim)`` for i in [0, head_dim/2), float32 [head_dim/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / (theta**exponents)


class RotaryEmbedding(nn.Module):
    """Holds one layer's stored copy of ``inv_freq`` under its published name; tables are computed once per model."""

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        frequencies = inverse_frequencies(head_dim, theta).to(torch.get_default_dtype())
        self.register_buffer("inv_freq", frequencies, persistent=True)


def rotary_tables(inv_freq: torch.Tensor, positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of every position, each [B, 1, S, E/2], computed entirely in ``inv_freq``'s dtype."""
    angles = positions_BS.to(inv_freq.dtype)[:, None, :, None] * inv_freq
    return angles.cos(), angles.sin()


def rotate(x_BHSE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of every head (half-split layout, not interleaved).

    Tables of the heads' dtype rotate in that dtype and round each product and the sum. Float32 tables on bfloat16 heads
    rotate in float32 and round once.
    """
    first, second = x_BHSE.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return cast_unless_same(rotated, x_BHSE.dtype)
