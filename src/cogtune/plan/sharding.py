"""What a sharded run has gathered beside its shards, moment by moment of a step.

A unit is what one all-gather fetches: a decoder layer, a tower layer, the embedding, the head. Its bytes lie in two
places. Whole weights that the computation reads are ordinary memory. The all-gather itself writes into buffers that
belong to a CUDA stream of its own; the allocator keeps a pool for each stream, and gives nothing of it to another.

fsdp2 gathers a unit into a buffer, copies it out, and frees the buffer when the next unit has been copied out; in the
forward pass one layer is prefetched, and in the backward pass too, where a buffer is freed at once. zero3 gathers into
a buffer and joins the weights in the same stream, so that all it holds counts as buffers. A test holds fsdp2's numbers
to `fully_shard` itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cogtune.configuration.quantization import QuantSection
from cogtune.distributed.buffers import ZERO3_LAYERS_AHEAD
from cogtune.plan.setting import BYTES, Setting, format_of
from cogtune.plan.sizes import Linear, ModelSizes


@dataclass(frozen=True)
class Gathered:
    """Bytes of whole weights, and of the all-gather stream's buffers."""

    whole: int = 0
    buffers: int = 0


NOTHING = Gathered()


def unit_bytes(linears: Iterable[Linear], quant: QuantSection, dtype: str) -> int:
    """What one all-gather of these linears moves: of an NF4 weight its codes (the scales are whole on every rank)."""
    c, found = BYTES[dtype], 0
    for linear in linears:
        form = format_of(linear, quant)
        each = linear.weights // 2 if form == "nf4" else linear.weights * (c if form == "none" else 1)
        found += each + (linear.outputs * c if linear.bias else 0)
    return found


@lru_cache(maxsize=64)
def _units(sizes: ModelSizes, quant: QuantSection, dtype: str) -> tuple[int, int, int, int]:
    """A decoder layer, a tower layer, the head and the embedding."""
    own = [[x for x in sizes.linears if name in x.name] for name in ("model.layers.0.", ".transformer.layers.0.")]
    own.append([x for x in sizes.linears if x.part == "head"])
    layer, block, head = (unit_bytes(linears, quant, dtype) for linears in own)
    return layer, block, head, 0 if quant.embedding == "host" else sizes.parameters("embedding") * BYTES[dtype]


class Gathering:
    """What is gathered at each moment of a step under one setting; all zero where nothing is sharded.

    The head stays whole from the first moment to the last: the loss reads it at the end of the forward pass and at once
    again in the backward pass."""

    def __init__(self, setting: Setting) -> None:
        units = _units(setting.sizes, setting.quant, setting.dtype) if setting.shards > 1 else (0, 0, 0, 0)
        self.layer, self.block, self.head, self.embedding = units
        self.layers, self.zero3 = setting.sizes.num_hidden_layers, setting.engine == "zero3"
        # parallel.keep_gathered: the first layers stay whole from their forward pass to their backward pass
        self.kept = min(setting.keep_gathered, self.layers) if setting.engine == "fsdp2" else 0

    def _at(self, unit: int, whole: int, ahead: int) -> Gathered:
        """``whole`` units of ``unit`` bytes can be computed with, and ``ahead`` more are in buffers."""
        if self.zero3:  # no second copy: a unit is in the buffer that it was gathered into, and one is prefetched
            return Gathered(0, self.head + (whole + min(ahead, 1)) * unit)
        return Gathered(self.head + whole * unit, ahead * unit)

    def start(self) -> Gathered:
        """The embedding is copied out, and the head's buffer is still there."""
        if self.zero3:
            return Gathered(0, self.head + self.embedding)
        return Gathered(self.head + self.embedding, self.head + self.embedding)

    def tower(self) -> Gathered:
        """In the middle of the tower: as between two decoder layers."""
        return self._at(self.block, 1, 2)

    def forward(self, index: int) -> Gathered:
        """Layer ``index`` runs, and those in front of it that stay gathered lie there. Its own buffer is not yet free,
        and the next layer's, where there is one, is being filled."""
        return self._at(self.layer, 1 + min(index, self.kept), 2 if index < self.layers - 1 else 1)

    def loss(self) -> Gathered:
        """The last layer's buffer is still there (fsdp2), or its weights are being gathered again (zero3)."""
        return self._at(self.layer, self.kept, 1)

    def backward(self, index: int) -> Gathered:
        """Layer ``index`` runs backward and the one in front of it is prefetched, unless it stayed whole. Layers behind
        it are freed."""
        return self._at(self.layer, min(index, self.kept) + 1, 1 if index > self.kept else 0)

    def pool(self) -> int:
        """The most that the buffers ever come to, which the allocator keeps for their stream alone."""
        most = max(self.start().buffers, *(self.forward(index).buffers for index in range(self.layers)))
        # Layers that wait in the device's queue hold their weights, and so does the one that runs: three. Measured
        # beyond the rest of the plan: 2.9 layers in eight-cards.json, 2.2 (all recomputed) in cards-zero3-h100.json.
        return most + (ZERO3_LAYERS_AHEAD + 1) * self.layer if self.zero3 else most
