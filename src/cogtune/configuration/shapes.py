"""Sizes, token ids and tensor names of the published model, special values in its inputs, and the loss's chunk size.

Needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BOS_ID, EOS_ID, PAD_ID = 128000, 128001, 128002
IGNORED_LABEL = -100
"""Label of a token without a loss, as in torch's cross-entropy."""
TREE_ROOT = -1
"""In ``segment_parents``: the segment is the root of a tree."""
UNUSED_PARENT = -2
"""In ``segment_parents``: padding; the row has no such segment."""

LOSS_CHUNK = 512
"""Tokens whose logits are computed at a time: 263 MB in float32 with the published vocabulary."""

VISION = "model.vision."
TOWER_PARTS = ("patch_embedding", "transformer", "conv")
"""Modules of `VisionModel` before the GLU adapter. Their output is cached while they are frozen."""
TOWER = tuple(f"{VISION}{part}." for part in TOWER_PARTS)
"""Prefixes of their tensors' names."""


@dataclass(frozen=True)
class VisionShape:
    """The tower's part of ``config.json``; names and defaults as published."""

    image_size: int = 1344
    patch_size: int = 14
    in_channels: int = 3
    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_heads: int = 16
    num_positions: int = 9217
    cell: int = 2
    """Patches along a side of a grid cell: 2 with the convolution after the tower, 1 in the first generation."""

    @property
    def grid_tokens(self) -> int:
        """Cells of an image's grid, after the 2x2 convolution if there is one (2304 at full size)."""
        return (self.image_size // self.patch_size // self.cell) ** 2

    @property
    def image_tokens(self) -> int:
        """Positions of one image in the decoder: the grid and the begin and end tokens (2306 at full size)."""
        return self.grid_tokens + 2


@dataclass(frozen=True)
class Shape:
    """``config.json``'s sizes; names and defaults as published."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_multi_query_heads: int = 8
    generation: int = 2
    """1: CogVLM, whose tower has no convolution after it and whose vision experts have no bias."""
    vision_experts: bool = True
    """Whether image tokens have expert weights of their own; the video models have one expert for all tokens."""
    vision: VisionShape = field(default_factory=VisionShape)
