"""Triton kernels, one file per job. Import them only if `HAS_TRITON`; without Triton the modules that use them run the
same computation with torch."""

from __future__ import annotations

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernel_available(x: torch.Tensor) -> bool:
    """Return whether kernels can run on ``x``: it is on a GPU, and Triton is installed."""
    return HAS_TRITON and x.is_cuda
