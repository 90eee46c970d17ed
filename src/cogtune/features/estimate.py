"""Estimate of the time to fill the cache: the tower's FLOPs over the device's speed in a short trial."""

from __future__ import annotations

import time

import torch

from cogtune.configuration.model import CogVLM2Config, CogVLM2VisionConfig

# Attention and elementwise operations (GELU, norms, residuals) make the tower slower than the matrix product alone: on
# an H100 it reached 0.72 of its speed (reference: 218 ms for 117 TFLOP; the product alone runs at 745 TFLOP/s).
_SHARE = 0.7
_ROWS = 4096


def tower_flops(config: CogVLM2Config) -> float:
    """Return the floating point operations of the tower for one picture (117e12 at full size)."""
    vision = config.vision_config
    assert isinstance(vision, CogVLM2VisionConfig)
    tokens, width, inner = vision.patch_grid**2 + 1, vision.hidden_size, vision.intermediate_size
    matmuls = 2 * tokens * width * (4 * width + 2 * inner)
    attention = 4 * tokens**2 * width
    return float(vision.num_hidden_layers * (matmuls + attention))


def seconds_per_picture(config: CogVLM2Config, device: torch.device, dtype: torch.dtype) -> float:
    """Estimate the seconds per picture from a matrix product of the tower's shape, timed on the device."""
    vision = config.vision_config
    assert isinstance(vision, CogVLM2VisionConfig)
    width, inner = vision.hidden_size, vision.intermediate_size
    rows = _ROWS if device.type == "cuda" else 64
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(width, inner, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return tower_flops(config) / (2 * rows * width * inner / best) / _SHARE
