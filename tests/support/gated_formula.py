"""What a gated product with low-rank updates is, written out."""

from __future__ import annotations

import torch
from torch.nn import functional


def updated_product(
    gate: torch.Tensor,
    up: torch.Tensor,
    small: torch.Tensor,
    gate_matrix: torch.Tensor,
    up_matrix: torch.Tensor,
    first: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cogtune.model.swiglu.GatedProduct`, for autograd to differentiate."""
    gate_small, up_small = small.split([gate_matrix.shape[1], up_matrix.shape[1]], dim=1)
    inner = functional.silu(gate + gate_small @ gate_matrix.t()) * (up + up_small @ up_matrix.t())
    return inner, inner @ first.t()
