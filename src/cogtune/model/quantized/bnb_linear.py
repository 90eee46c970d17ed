"""Frozen linear layers in 4 and 8 bits through bitsandbytes. Imported only where such layers are created.

Shapes: M tokens, I input and O output features.

Storage, rounding and 4-bit products come from bitsandbytes, but its layers' forward passes are not used. The 4-bit one
repacks weights for inference on some CPUs, which drops gradients. The 8-bit one quantises activations to 8 bits through
float16, and saves its input for a gradient that a frozen weight does not have, which defeats activation checkpointing.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import functional

from cogtune.distributed.shards import note_whole_numel
from cogtune.model.compiler_workarounds import cast_unless_same
from cogtune.model.quantized.nf4 import block_sizes, dequantises, nf4_linear


class FourBitLinear(bnb.nn.Linear4bit):
    """Linear layer with 4-bit weights, NF4 or FP4; computes in its input's dtype."""

    block_sizes: tuple[int, int, int, int, int]

    def large_tensors(self) -> list[tuple[Any, str]]:
        """Return where the tensors of the layer's size are: an object and its attribute each."""
        return [(self, "weight"), (self.quant_state, "absmax")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # Read the state from the module: engines replace the parameter and lose its attributes.
        if dequantises(x, self.quant_state):
            return nf4_linear(x, self.weight, self.quant_state, bias, self.block_sizes)
        product: torch.Tensor = bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=self.quant_state)
        return product


def to_four_bit(layer: nn.Linear, kind: str = "nf4") -> FourBitLinear:
    """Quantise ``layer`` to ``kind`` (nf4 or fp4) with double quantisation, on its device. The storage dtype is the
    layer's, as sharding needs."""
    found = _four_bit(layer.in_features, layer.out_features, kind, layer.weight.dtype)
    found.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type=kind, quant_storage=layer.weight.dtype, module=found
    ).to(layer.weight.device)
    found.block_sizes = block_sizes(found.quant_state)
    note_whole_numel(found.weight, layer.weight.numel())
    found.bias = _frozen(layer.bias)
    return found


def from_stored(parts: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> FourBitLinear:
    """Build a 4-bit layer without bias from the tensors of bitsandbytes' serialised layout, on their device.

    ``parts`` is keyed by the name after ``.weight`` (the weight itself is ``""``). The codes are viewed in ``dtype``,
    the model's, as `to_four_bit` stores them.

    Raises:
        ValueError: the tensors describe a layer of another shape.
    """
    whole = parts[""].view(torch.uint8).flatten()
    data = (whole.view(dtype) if whole.numel() % dtype.itemsize == 0 else whole).view(-1, 1)
    stats = {f"weight.{name}": value for name, value in parts.items() if name}
    kind = next(name for name in parts if name.startswith("quant_state.bitsandbytes__")).rpartition("__")[2]
    found = _four_bit(shape[1], shape[0], kind, data.dtype)
    found.weight = bnb.nn.Params4bit.from_prequantized(data, stats, device=data.device, module=found)
    if found.quant_state.shape != shape:
        raise ValueError(f"has shape {list(found.quant_state.shape)}, expected {list(shape)}")
    found.block_sizes = block_sizes(found.quant_state)
    note_whole_numel(found.weight, shape.numel())
    found.bias = None
    return found


def _four_bit(inputs: int, outputs: int, kind: str, storage: torch.dtype) -> FourBitLinear:
    return FourBitLinear(inputs, outputs, bias=False, quant_type=kind, quant_storage=storage, device="meta")


class _Int8Product(torch.autograd.Function):
    """``x (W S)' + b`` with integers W and one scale per output feature, and a gradient for x alone.

    Integers up to 127 are exact in every dtype, so the scale is applied to the product instead of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        product = functional.linear(x, weight_OI.to(x.dtype)) * scale_O
        return cast_unless_same(product if bias_O is None else product + bias_O, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale).to(gradient.dtype) @ weight.to(gradient.dtype), None, None, None


class Int8Linear(bnb.nn.Linear8bitLt):
    """Linear layer with 8-bit weights and one scale per output feature; computes in its input's dtype."""

    def large_tensors(self) -> list[tuple[Any, str]]:
        """Return where the tensors of the layer's size are: an object and its attribute each; here two names of one."""
        return [(self, "weight"), (self.state, "CB")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Int8Product.apply(x, self.weight, self.state.SCB * (1 / 127), self.bias)
        return product


def to_int8(layer: nn.Linear) -> Int8Linear:
    """Quantise ``layer`` to 8 bits on its device: each output feature's largest weight becomes 127."""
    rounded, largest, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.to(torch.float16))
    found = _int8(rounded, largest)
    found.bias = _frozen(layer.bias)
    return found


def int8_from_codes(codes: torch.Tensor, largest: torch.Tensor) -> Int8Linear:
    """Build an 8-bit layer without bias from integers int8 [O, I] and what 127 stands for in each row, float32 [O]."""
    found = _int8(codes, largest)
    found.bias = None
    return found


def _int8(codes: torch.Tensor, largest: torch.Tensor) -> Int8Linear:
    found = Int8Linear(codes.shape[1], codes.shape[0], bias=False, has_fp16_weights=False, device="meta")
    found.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    found.weight.CB = found.weight.SCB = None
    found.state.CB, found.state.SCB = found.weight.data, largest
    return found


def _frozen(bias: nn.Parameter | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.data, requires_grad=False)
