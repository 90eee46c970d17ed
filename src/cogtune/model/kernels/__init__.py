"""Triton kernels, one file per job. Import them only if `HAS_TRITON`; without Triton the modules that use them run the
same computation with torch."""

from __future__ import annotations

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernel_available(x: torch.Tensor) -> bool:
    """Return whether kernels can run on ``x``: it is on a GPU, and Triton is installed."""
    return HAS_TRITON and x.is_cuda


def inference_kernel_available(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Return whether a kernel without a gradient can replace eager operators on the rows of ``x`` [R, ...], R > 1.

    Compiled layers have their own kernels; so has a decode step for one row. A kernel runs on the current GPU.
    """
    if not kernel_available(x) or torch.compiler.is_compiling() or torch.is_grad_enabled() or x.shape[0] < 2:
        return False
    there = torch.device("cuda", torch.cuda.current_device())
    return x.is_contiguous() and all(tensor.device == there for tensor in (x, *weights))
