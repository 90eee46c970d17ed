"""Kernels written in Triton, one file for each job. They are imported only where `HAS_TRITON`; everywhere else the
modules that use them compute the same with torch."""

from __future__ import annotations

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernel_available(x: torch.Tensor) -> bool:
    """Whether kernels can run on ``x``: it lies on a GPU, and Triton is installed."""
    return HAS_TRITON and x.is_cuda
