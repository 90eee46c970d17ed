"""All-gathered weights of a sharded run at each moment of a step, in addition to the shards.

A unit is what one all-gather fetches: a decoder layer, a tower layer, the embedding or the head. Its bytes can be in
two places. Complete weights that kernels read are ordinary memory. The all-gather writes into buffers that belong to a
separate CUDA stream; the caching allocator has one pool per stream and never reuses its memory for another stream.

fsdp2 gathers a unit into a buffer, copies it out, and frees the buffer after the next unit has been copied out. The
forward pass prefetches one layer; so does the backward pass, which frees a buffer at once. zero3 gathers into a buffer
and joins the weights in the same stream, so all its bytes count as buffers. A test compares fsdp2's numbers with
`fully_shard` itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cogtune.configuration.quantization import FOUR_BIT, QuantSection
from cogtune.distributed.buffers import ZERO3_LAYERS_AHEAD
from cogtune.plan.setting import BYTES, Setting, format_of
from cogtune.plan.sizes import Linear, ModelSizes


@dataclass(frozen=True)
class Gathered:
    """Bytes of complete weights, and of the all-gather stream's buffers."""

    whole: int = 0
    buffers: int = 0


NOTHING = Gathered()


def unit_bytes(linears: Iterable[Linear], quant: QuantSection, dtype: str) -> int:
    """Return the bytes of one all-gather of these linears.

    Of an NF4 weight only the codes are sharded, not the scales.
    """
    c, found = BYTES[dtype], 0
    for linear in linears:
        form = format_of(linear, quant)
        # NF4 packs two weights into a byte; int8 and fp8 take one byte per weight
        each = linear.weights // 2 if form in FOUR_BIT else linear.weights * (c if form == "none" else 1)
        found += each + (linear.outputs * c if linear.bias else 0)
    return found


@lru_cache(maxsize=64)
def _units(sizes: ModelSizes, quant: QuantSection, dtype: str) -> tuple[int, int, int, int, int]:
    """Return the bytes of a decoder layer, a tower layer, the head, the GLU adapter and the embedding."""
    # every decoder layer and every tower layer has the same size, so layer 0 stands for all
    own = [[x for x in sizes.linears if name in x.name] for name in ("model.layers.0.", ".transformer.layers.0.")]
    own += [[x for x in sizes.linears if x.part == part] for part in ("head", "glu_adapter")]
    layer, block, head, glu = (unit_bytes(linears, quant, dtype) for linears in own)
    return layer, block, head, glu, 0 if quant.embedding == "host" else sizes.parameters("embedding") * BYTES[dtype]


class Gathering:
    """What is gathered at each moment of a step; all zero if nothing is sharded.

    The head stays gathered from the start to the end of a step: the loss needs it at the end of the forward pass and at
    the start of the backward pass.
    """

    def __init__(self, setting: Setting) -> None:
        units = _units(setting.sizes, setting.quant, setting.dtype) if setting.shards > 1 else (0, 0, 0, 0, 0)
        self.layer, self.block, self.head, self.glu, self.embedding = units
        self.layers, self.zero3 = setting.sizes.num_hidden_layers, setting.engine == "zero3"
        self.runs_ahead = setting.engine == "fsdp2" and setting.compiled
        # parallel.keep_gathered: these first layers stay gathered from their first use on
        self.kept = min(setting.keep_gathered or 0, self.layers) if setting.engine == "fsdp2" else 0

    def _at(self, unit: int, whole: int, ahead: int) -> Gathered:
        """``whole`` units of ``unit`` bytes are ready for use, and ``ahead`` more are in buffers."""
        if self.zero3:  # zero3 computes from the buffer itself (no second copy) and prefetches one unit
            return Gathered(0, self.head + (whole + min(ahead, 1)) * unit)
        return Gathered(self.head + whole * unit, ahead * unit)

    def start(self) -> Gathered:
        """The embedding has been copied out, and the buffers of head and embedding are not free yet."""
        if self.zero3:
            return Gathered(0, self.head + self.embedding)
        return Gathered(self.head + self.embedding + self.kept * self.layer, self.head + self.embedding)

    def tower(self) -> Gathered:
        """A layer in the middle of the tower: its buffer and the next layer's, as between two decoder layers."""
        found = self._at(self.block, 1, 2)
        return Gathered(found.whole + self.kept * self.layer, found.buffers)

    def forward(self, index: int) -> Gathered:
        """The forward pass of layer ``index``: this layer and those that stay gathered are complete.

        Its buffer is not free yet, and the next layer's (unless this is the last) is being filled. Layers that stay
        gathered fill none, and the GLU adapter's, which ran before them, waits for the next one that does.
        """
        own, following = index >= self.kept, self.kept <= index + 1 < self.layers
        if not own:
            return Gathered(self.head + self.kept * self.layer, self.glu + following * self.layer)
        return self._at(self.layer, self.kept + 1, 1 + following)

    def loss(self) -> Gathered:
        """The loss. fsdp2 has not freed the last layer's buffer; zero3 is gathering that layer again."""
        if self.kept == self.layers:
            return self.forward(self.layers - 1)
        return self._at(self.layer, self.kept, 1)

    def backward(self, index: int) -> Gathered:
        """The backward pass of layer ``index``, which prefetches the layer before it unless that one stayed gathered.

        Later layers have been freed.
        """
        return self._at(self.layer, self.kept + (index >= self.kept), 1 if index > self.kept else 0)

    def pool(self) -> int:
        """Peak of the buffers over a step, which the allocator keeps in their stream's pool."""
        most = max(self.start().buffers, *(self.forward(index).buffers for index in range(self.layers)))
        # The host runs ahead of the GPU, so layers that are queued hold their gathered weights, as does the running
        # one: three layers. The measured rest is 2.9 layers in eight-cards.json and 2.2 (all recomputed) in
        # cards-zero3-h100.json.
        if self.zero3:
            return most + (ZERO3_LAYERS_AHEAD + 1) * self.layer
        # with compiled layers fsdp2's host runs ahead by a layer too (two-cards-h200.json)
        return most + self.layer * (self.runs_ahead and self.kept < self.layers)
