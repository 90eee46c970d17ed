"""Floating-point operations of a training step, counted as LoRA-MFU is defined.

LoRA-MFU = (2 x the forward operations of layers that gradients pass through + the forward operations of forward-only
layers) / time / the card's dense bf16 peak. Recomputation, adapters, norms and the optimiser do not count. A decoder
layer counts fully (also the last one, of which image tokens need only a part); attention counts pairs of tokens that
see each other; the head counts labelled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cogtune.plan.sizes import EXPERTS, ModelSizes

DENSE_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second, by a part of the card's name."""


@dataclass(frozen=True)
class Work:
    """Work of one forward pass, counted over the whole batch."""

    tokens: int
    pairs: int  # pairs of a token and one that it sees, itself included
    labels: int
    images: int
    rows: int


@dataclass(frozen=True)
class Flops:
    """Forward operations by part."""

    tower: int
    glu_adapter: int
    decoder_layer: int  # one layer
    layers: int
    head: int

    @property
    def forward(self) -> int:
        return self.tower + self.glu_adapter + self.layers * self.decoder_layer + self.head


def work_of(batch: dict[str, Any], num_image_tokens: int) -> Work:
    """Count a collated batch. In a tree, a token sees its ancestors and the earlier tokens of its segment."""
    pairs = 0
    for segments, parents in zip(batch["segment_ids"], batch["segment_parents"], strict=True):
        lengths = segments[segments >= 0].bincount().tolist()
        before: list[int] = []
        for length, parent in zip(lengths, parents.tolist(), strict=False):
            behind = 0 if parent < 0 else before[parent] + lengths[parent]
            before.append(behind)
            pairs += length * behind + length * (length + 1) // 2
    return Work(
        tokens=int(batch["attention_mask"].sum()),
        pairs=pairs,
        labels=int(batch["num_labels"]),
        images=int(batch["token_type_ids"].sum()) // num_image_tokens,
        rows=len(batch["input_ids"]),
    )


def forward_flops(sizes: ModelSizes, work: Work) -> Flops:
    """Count two operations per weight and token, and four per head width and pair in attention (scores and weighted
    sum).
    """
    # a token passes through one of the two experts, which have the same size
    decoder = sum(x.weights for (expert, _), x in sizes.decoder_layers[0].items() if expert == EXPERTS[-1])
    vision, grid = sizes.vision, sizes.grid_tokens
    block = sum(x.weights for x in sizes.linears if x.part == "tower" and x.layer == 0)
    patches = vision.num_positions
    patch_weights = vision.in_channels * vision.patch_size**2 * vision.hidden_size
    tower = vision.num_hidden_layers * (2 * patches * block + 4 * vision.hidden_size * patches**2)
    convolution = vision.cell**2 * vision.hidden_size**2 if vision.cell > 1 else 0
    tower += 2 * (patches - 1) * patch_weights + 2 * grid * convolution
    glu = sum(x.weights for x in sizes.linears if x.part == "glu_adapter")
    return Flops(
        tower=work.images * tower,
        glu_adapter=2 * work.images * grid * glu,
        decoder_layer=2 * work.tokens * decoder + 4 * sizes.num_attention_heads * sizes.head_dim * work.pairs,
        layers=sizes.num_hidden_layers,
        head=2 * work.labels * sizes.parameters("head"),
    )


def step_flops(flops: Flops, *, live_tower: bool, first_trained_layer: int = 0, vision_trains: str = "") -> int:
    """Return the operations of a training step.

    ``first_trained_layer``: gradients stop there. ``vision_trains``: "glu" if the GLU adapter has a LoRA, "tower" if
    the tower has one; gradients then pass through both.
    """
    through = flops.layers if vision_trains else flops.layers - first_trained_layer
    decoder = flops.decoder_layer * (flops.layers + through)
    glu = flops.glu_adapter * (2 if vision_trains else 1)
    tower = flops.tower * (2 if vision_trains == "tower" else 1) if live_tower else 0
    return decoder + glu + tower + 2 * flops.head


def trained_extent(names: list[str], layers: int) -> tuple[int, str]:
    """Return the first trained decoder layer and ``vision_trains``, from the names of trained parameters."""
    decoder = [int(name.split(".layers.")[1].split(".")[0]) for name in names if ".vision." not in name]
    vision = [name for name in names if ".vision." in name]
    if any(".transformer." in name or ".conv." in name or ".patch_embedding." in name for name in vision):
        return 0, "tower"
    return (0, "glu") if vision else (min(decoder, default=layers), "")


def peak_rate(card: str) -> float | None:
    """Return the card's dense bf16 rate, or None if unknown."""
    return next((rate for name, rate in DENSE_PEAK.items() if name in card), None)
