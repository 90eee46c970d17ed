"""Products with bitsandbytes' NF4 weights: dequantised by one generated kernel, then multiplied at full speed.

Shapes: M tokens, I input and O output features. A weight [O, I] is stored as bitsandbytes stores it: two 4-bit codes a
byte, the first in the upper half, a scale for every 64 values, and these scales in 8 bits with scales of their own.

More than a few tokens at a time are multiplied fastest with the weight in the computation's number format, so forward
and backward each make it anew, and never keep it. bitsandbytes does the same with several kernels; here torch.compile
makes one, which reads 0.53 and writes 2 bytes a value and nothing else. Storage stays bitsandbytes' own, so its files,
its state and peft's handling of it do too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch.nn import functional

_HAS_COMPILER = importlib.util.find_spec("triton") is not None
_FEW = 16  # tokens up to which bitsandbytes' fused kernel reads less (decoding)
_CODES = 16


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    outer_absmax: torch.Tensor | None,
    outer_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    outer_blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values of a packed weight, flat.

    ``absmax`` is float32 a block of ``blocksize``, or uint8 with ``outer_absmax``, ``outer_code`` and ``offset``.
    """
    scale = absmax
    if outer_absmax is not None and outer_code is not None and offset is not None:
        block = torch.arange(absmax.shape[0], device=absmax.device) // outer_blocksize
        scale = outer_code[absmax.int()] * outer_absmax[block] + offset
    flat = packed.flatten()
    values = code[torch.stack([flat >> 4, flat & (_CODES - 1)], dim=1).flatten().int()]
    owner = torch.arange(values.shape[0], device=packed.device) // blocksize
    return (values * scale[owner]).to(dtype)


_generated = torch.compile(dequantize, dynamic=True)


def _weight(x: torch.Tensor, state: tuple[Any, ...], sizes: list[int]) -> torch.Tensor:
    rows, columns, blocksize, outer_blocksize = sizes
    make: Any = _generated if x.is_cuda else dequantize
    return make(*state, blocksize, outer_blocksize, x.dtype).view(rows, columns)


# Opaque to the compiler of the layers around them: it would see the weight made twice, make it once and keep it.
@torch.library.custom_op("cogtune::nf4_linear", mutates_args=())
def _linear(
    x_MI: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    outer_absmax: torch.Tensor | None,
    outer_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    sizes: list[int],
) -> torch.Tensor:
    weight = _weight(x_MI, (packed, absmax, code, outer_absmax, outer_code, offset), sizes)
    return functional.linear(x_MI, weight, bias)


@torch.library.custom_op("cogtune::nf4_input_gradient", mutates_args=())
def _input_gradient(
    gradient_MO: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    outer_absmax: torch.Tensor | None,
    outer_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    sizes: list[int],
) -> torch.Tensor:
    return gradient_MO @ _weight(gradient_MO, (packed, absmax, code, outer_absmax, outer_code, offset), sizes)


@_linear.register_fake
def _(x_MI: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x_MI.new_empty(x_MI.shape[0], arguments[-1][0])


@_input_gradient.register_fake
def _(gradient_MO: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return gradient_MO.new_empty(gradient_MO.shape[0], arguments[-1][1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.sizes = inputs[-1]
    ctx.save_for_backward(*inputs[1:7])


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    found = _input_gradient(gradient.contiguous(), *ctx.saved_tensors, ctx.sizes)
    return found, None, None, None, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_remember)


def nf4_linear(x: torch.Tensor, packed: torch.Tensor, state: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., I] times a weight packed by bitsandbytes, in storage of any number format, plus a bias: [..., O]."""
    outer = state.state2 if state.nested else None
    rows, columns = state.shape
    sizes = [rows, columns, state.blocksize, 1 if outer is None else outer.blocksize]
    product: torch.Tensor = _linear(
        x.flatten(0, -2), packed.view(torch.uint8), state.absmax, state.code, None if outer is None else outer.absmax,
        None if outer is None else outer.code, state.offset if state.nested else None,
        None if bias is None else bias.to(x.dtype), sizes,
    )  # fmt: skip
    return product.view(*x.shape[:-1], rows)


def generates(x: torch.Tensor, state: Any) -> bool:
    """Whether the generated kernel is the faster way for this input: on a GPU for which there is a compiler, NF4, and
    not a few tokens of decoding, for which bitsandbytes reads the packed weight once."""
    if not (x.is_cuda and _HAS_COMPILER and state.quant_type == "nf4"):
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or x.numel() > _FEW * x.shape[-1]
