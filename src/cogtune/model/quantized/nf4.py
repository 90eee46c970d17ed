"""Products with bitsandbytes' 4-bit weights: dequantise the weight with one kernel, then multiply at full speed.

Shapes: M tokens, I input and O output features. A weight [O, I] has bitsandbytes' storage layout: two 4-bit codes per
byte, the first in the upper half, one scale per 64 values, and these scales in float32 or in 8 bits with scales of
their own. NF4 and FP4 differ only in the 16 values of the codes.

For more than a few tokens, dequantising to the computation's dtype and calling a library product is fastest. So the
forward and backward pass each dequantise the weight and never keep it. With Triton one kernel does this in half the
time of bitsandbytes' three (docs/log.md), with identical bits; elsewhere bitsandbytes does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from cogtune.configuration.quantization import FOUR_BIT
from cogtune.model.kernels import HAS_TRITON, kernel_available

_FEW = 16  # most tokens for which bitsandbytes' fused kernel reads less memory (decoding)
if HAS_TRITON:
    from cogtune.model.kernels.nf4 import dequantize_nf4
_FORWARD, _BACKWARD = 0, 1


def _fits_kernel(x: torch.Tensor, sizes: Sequence[int]) -> bool:
    return kernel_available(x) and sizes[0] * sizes[1] % sizes[2] == 0


def _weight(x: torch.Tensor, state: tuple[Any, ...], sizes: Sequence[int], use: int) -> torch.Tensor:
    """Dequantise the weight [O, I] to x's dtype. ``absmax`` is float32 per block, or uint8 with scales of its own."""
    packed, absmax, code, outer_absmax, outer_code, offset = state
    rows, columns, blocksize, outer_blocksize, kind = sizes
    if _fits_kernel(x, sizes):
        made: torch.Tensor = dequantize_nf4(
            packed, state[1:], (rows, columns, blocksize, outer_blocksize), x.dtype, use
        )
        return made
    from bitsandbytes import functional as bnb  # always installed where such a weight exists

    if outer_absmax is not None:
        absmax = offset + bnb.dequantize_blockwise(
            absmax, absmax=outer_absmax, code=outer_code, blocksize=outer_blocksize
        )
    described = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size((rows * columns,)),  # flat: see `dequantises`
        code=code,
        blocksize=blocksize,
        quant_type=FOUR_BIT[kind],
        dtype=x.dtype,
    )
    out: torch.Tensor = bnb.dequantize_4bit(packed.view(-1, 1), described)
    return out.view(rows, columns)


class _Product(torch.autograd.Function):
    """``x W' + b`` with a gradient for x alone. Saves the packed weight for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...], *state: Any
    ) -> torch.Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(*state)
        return functional.linear(x_MI, _weight(x_MI, state, sizes, _FORWARD), bias)

    @staticmethod
    def backward(ctx: Any, gradient_MO: torch.Tensor) -> tuple[Any, ...]:
        found = gradient_MO @ _weight(gradient_MO, ctx.saved_tensors, ctx.sizes, _BACKWARD)
        return found, None, None, None, None, None, None, None, None


# The same as opaque custom ops, for compiled layers whose weight bitsandbytes dequantises. Custom ops have several
# times the launch overhead of the function above, whose Triton kernel the compiler can launch itself.
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
    weight = _weight(x_MI, (packed, absmax, code, outer_absmax, outer_code, offset), sizes, _FORWARD)
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
    state = (packed, absmax, code, outer_absmax, outer_code, offset)
    return gradient_MO @ _weight(gradient_MO, state, sizes, _BACKWARD)


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


def block_sizes(state: Any) -> tuple[int, int, int, int, int]:
    """Return rows, columns, block size, outer block size and format (an index in `FOUR_BIT`) of a weight that a
    bitsandbytes quant state describes."""
    rows, columns = state.shape
    outer = state.state2.blocksize if state.nested else 1
    return rows, columns, state.blocksize, outer, FOUR_BIT.index(state.quant_type)


def nf4_linear(
    x: torch.Tensor, packed: torch.Tensor, state: Any, bias: torch.Tensor | None, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Multiply x [..., I] by a weight packed by bitsandbytes, in storage of any dtype, and add a bias: [..., O].

    ``sizes`` is `block_sizes` of ``state``, stored on the module: the compiler treats a module's numbers as constants,
    but not those of other objects.
    """
    outer = state.state2 if state.nested else None
    stored = (
        packed.view(torch.uint8), state.absmax, state.code, None if outer is None else outer.absmax,
        None if outer is None else outer.code, state.offset if state.nested else None,
    )  # fmt: skip
    flat, bias = x.flatten(0, -2), None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling() and not _fits_kernel(x, sizes):
        product: torch.Tensor = _linear(flat, *stored, bias, list(sizes))
    else:
        product = _Product.apply(flat, bias, sizes, *stored)
    return product.view(*x.shape[:-1], sizes[0])


def dequantises(x: torch.Tensor, state: Any) -> bool:
    """Return whether the whole weight is dequantised for this input: in 4 bits, always on a CPU, and on a GPU for more
    than a few tokens.

    For a few decoded tokens bitsandbytes' fused kernel reads the packed weight once. On a CPU with AVX-512 bitsandbytes
    0.50 begins a block with every row of a weight, where blocks go on over rows that are no multiple of them; told of
    one long row it does not.
    """
    if state.quant_type not in FOUR_BIT:
        return False
    return not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()) or x.numel() > _FEW * x.shape[-1]
