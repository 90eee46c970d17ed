"""Bytes of linear layers in every number format, and of layers that are streamed from host memory.

`model.layer_streaming` moves the tensors of a layer's size: weights, and the 8-bit scales of 4-bit blocks. Biases,
scales per output and code tables stay on the card. A test compares the numbers with the layers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cogtune.configuration.quantization import FOUR_BIT
from cogtune.plan.setting import BYTES, Setting, format_of
from cogtune.plan.sizes import Linear

FLOAT32 = 4
BLOCK, NESTED = 64, 256  # bitsandbytes: weights per scale, and scales per second-level scale
BUFFERS = 2
"""Layers on the card while others are streamed: the one that computes, and the one that is being copied."""


def weight_bytes(linear: Linear, form: str, dtype: str) -> int:
    """Return a linear layer's bytes in a number format: ``none`` (the model's own), ``nf4``, ``fp4``, ``int8`` or
    ``fp8``."""
    bias = linear.outputs * BYTES[dtype] if linear.bias else 0
    count = linear.weights
    if form in FOUR_BIT:
        return count // 2 + scale_bytes(linear, form) + bias
    if form == "int8":
        return count + linear.outputs * FLOAT32 + bias
    if form in ("fp8", "fp8 twice"):
        return count * (2 if form == "fp8 twice" else 1) + linear.outputs * FLOAT32 + bias
    return count * BYTES[dtype] + bias


def scale_bytes(linear: Linear, form: str) -> int:
    """Return the bytes of a 4-bit weight besides its codes: one byte per block for its scale, the float32 second-level
    scales, two code tables and an offset; or, stored without the second level, a float32 per block and one table.
    """
    scales = -(-linear.weights // BLOCK) if form in FOUR_BIT else 0
    if linear.stored is not None and not linear.stored.nested:
        return (scales + 16) * FLOAT32
    return scales + -(-scales // NESTED) * FLOAT32 + (16 + 256 + 1) * FLOAT32 if scales else 0


def large_bytes(linear: Linear, form: str, dtype: str) -> int:
    """Return the bytes of a linear layer that are streamed."""
    each = {"int8": linear.weights, "fp8": linear.weights, "fp8 twice": 2 * linear.weights}
    scale = FLOAT32 if linear.stored is not None and not linear.stored.nested else 1
    each |= dict.fromkeys(FOUR_BIT, linear.weights // 2 + scale * -(-linear.weights // BLOCK))
    return each.get(form, linear.weights * BYTES[dtype])


@dataclass(frozen=True)
class Streaming:
    """Streamed layers of the decoder or the tower: how many, and the bytes of each."""

    layers: int = 0
    each: int = 0

    @classmethod
    def of_decoder(cls, setting: Setting) -> Streaming:
        layers = setting.sizes.num_hidden_layers
        return cls._of(setting, setting.resident, layers, list(setting.sizes.decoder_layers[0].values()))

    @classmethod
    def of_experts(cls, setting: Setting) -> Streaming:
        """Return what answering streams of the decoder: the vision experts, or all (``quant.stream all``)."""
        layer, everything = setting.sizes.decoder_layers[0], setting.quant.stream == "all"
        own = [linear for (expert, _), linear in layer.items() if everything or expert == "vision"]
        return cls._of(setting, setting.resident, setting.sizes.num_hidden_layers, own)

    @classmethod
    def of_tower(cls, setting: Setting) -> Streaming:
        own = [linear for linear in setting.sizes.linears if linear.part == "tower" and linear.layer == 0]
        return cls._of(setting, setting.tower_resident, setting.sizes.vision.num_hidden_layers, own)

    @classmethod
    def _of(cls, setting: Setting, resident: int | None, layers: int, linears: Sequence[Linear]) -> Streaming:
        if resident is None or resident >= layers:
            return cls()
        each = sum(large_bytes(linear, format_of(linear, setting.quant), setting.dtype) for linear in linears)
        return cls(layers - resident, each)

    @property
    def host(self) -> int:
        """Bytes of pinned host memory."""
        return self.layers * self.each

    @property
    def buffers(self) -> int:
        """Bytes of the layers that are on the card at a time."""
        return min(self.layers, BUFFERS) * self.each

    @property
    def saved(self) -> int:
        """Bytes that the card holds less than without streaming."""
        return max(0, self.layers - BUFFERS) * self.each

    @property
    def copied(self) -> int:
        """Bytes copied to the card in each pass: what the last pass used last is still there."""
        return max(0, self.layers - BUFFERS) * self.each
