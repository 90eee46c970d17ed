"""Adapters on a tiny base, with weights that change its answers visibly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cogtune.adapters.attach import attach, save_adapter
from cogtune.checkpoint.load import load_model
from cogtune.configuration.run_config import LoraSection


def write_adapter(base: Path, folder: Path, *, seed: int = 1, size: float = 0.05, **lora: Any) -> Path:
    """An adapter on ``base`` whose weights are its initial ones plus normal noise of ``size``."""
    wrapped = attach(load_model(base), LoraSection(**({"rank": 4, "alpha": 8.0} | lora)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    save_adapter(wrapped, folder)
    return folder
