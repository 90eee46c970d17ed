"""A conversion that an autograd function may return."""

from __future__ import annotations

import torch


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``. Compiled by torch 2.11, an autograd function that returns the result of a conversion that
    changes nothing passes no gradient on, and nothing says so."""
    return x if x.dtype == dtype else x.to(dtype)
