"""What bitsandbytes' 4-bit weights stand for, value by value as the format is described, not by its own functions."""

from __future__ import annotations

from typing import Any

import torch


def four_bit_values(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weight of codes, two a byte with the first in the upper half, in the dtype of what was quantised."""
    scale = state.absmax
    if state.nested:
        outer = state.state2
        block = torch.arange(scale.shape[0]) // outer.blocksize
        scale = outer.code[scale.int()] * outer.absmax[block] + state.offset
    flat = packed.view(torch.uint8).flatten()
    values = state.code[torch.stack([flat >> 4, flat & 15], dim=1).flatten().int()]
    whole = values * scale[torch.arange(values.shape[0]) // state.blocksize]
    return whole.view(state.shape).to(state.dtype)
