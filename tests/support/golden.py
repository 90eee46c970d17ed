"""The numeric fixtures of the published modules at a tiny size, and the formula their weights follow.

The fixtures were produced by the published model code (float32, CPU) with weights anyone can rebuild from a hash of
each tensor's name; so they check this implementation against the original without containing a line of it.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogtune import CogVLM2Config, CogVLM2ForCausalLM

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "cogvlm2-golden.json"
TOLERANCE = 2e-5  # float32; a second plain implementation agreed within 9e-7, the rest is room for other kernels


FAMILY_FILE = GOLDEN_FILE.with_name("family-golden.json")


@cache
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN_FILE.read_text())


@cache
def family() -> dict[str, Any]:
    """The fixtures of the published video model."""
    return json.loads(FAMILY_FILE.read_text())


def hashed_uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """u in [-0.5, 0.5) per element: a 32-bit mix of crc32(name) and the flat index."""
    mask = 0xFFFFFFFF
    start = zlib.crc32(name.encode())
    x = (start + np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B9)) & np.uint64(mask)
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x85EBCA6B) & np.uint64(mask)
    x ^= x >> np.uint64(13)
    x = x * np.uint64(0xC2B2AE35) & np.uint64(mask)
    x ^= x >> np.uint64(16)
    return (x.astype(np.float64) / 2**32 - 0.5).reshape(shape)


def hashed_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    u = hashed_uniform(name, shape)
    parent = name.split(".")[-2] if "." in name else ""
    if name.endswith(".bias"):
        value = 0.2 * u
    elif "norm" in parent and name.endswith(".weight"):
        value = 1 + 0.2 * u
    elif any(part in name for part in ("embed_tokens", "position_embedding", "cls_embedding", ".boi", ".eoi")):
        value = u
    else:
        value = u * 2 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def golden_config() -> CogVLM2Config:
    stored = dict(golden()["config"])
    kept = {
        k: v for k, v in stored.items() if k not in ("output_attentions", "output_hidden_states", "use_return_dict")
    }
    return CogVLM2Config(**kept, pad_token_id=127, bos_token_id=3, eos_token_id=126)


def golden_model() -> CogVLM2ForCausalLM:
    model = CogVLM2ForCausalLM(golden_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(hashed_weight(name, tuple(parameter.shape)))
    return model.eval()


def golden_images(count: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(2 * hashed_uniform(f"image{i}", (3, 8, 8))).float() for i in range(count)])


def video_model() -> CogVLM2ForCausalLM:
    config = CogVLM2Config(**family()["config"], architectures=["CogVLMVideoForCausalLM"])
    model = CogVLM2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(hashed_weight(name, tuple(parameter.shape)))
    return model.eval()


def video_frames(numbers: list[int]) -> torch.Tensor:
    frames = [torch.from_numpy(2 * hashed_uniform(f"image{n}", (3, 8, 8))).float() for n in numbers]
    return torch.stack(frames) if frames else torch.zeros(0, 3, 8, 8)
