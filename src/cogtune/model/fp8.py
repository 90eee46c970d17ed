"""Frozen linear layers in fp8 (e4m3): half the memory of bfloat16, and faster on cards that multiply it.

Shapes: M tokens, I input and O output features. The weight [O, I] is rounded once, with one scale per output feature;
inputs and gradients are rounded as they come, with one scale per token. Products are summed in higher precision by the
card and scaled back. A row's largest element becomes e4m3's largest number, so rounding errs by up to 1/16 per element.

The gradient of the input is taken with the same rounded weight: the weight's scales go into the incoming gradient,
because they belong to the features that product sums over. The card reads its second operand along the summed features,
so the backward pass needs the weight transposed: made for the moment, or kept beside it (``keep_transposed``), which is
faster and costs as much memory again, what bfloat16 costs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from cogtune.errors import SetupError

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
_SMALLEST = 1e-12  # of a row's largest element; a row of zeros stays zeros
_FIRST_CARD = (8, 9)  # Ada and Hopper
_TRITON = importlib.util.find_spec("triton") is not None


def check_fp8(device: torch.device) -> None:
    """Raise SetupError, with what can be done, where ``device`` is a GPU that does not multiply fp8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_CARD:
        card = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        raise SetupError(
            f"{card} does not compute in fp8; cards from {_FIRST_CARD[0]}.{_FIRST_CARD[1]} on (Ada, Hopper) do",
            hint="use nf4 or int8 instead of fp8, or none",
            code="no-fp8",
        )


def quantize_rows(x: torch.Tensor, column_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [M, I], times ``column_scale`` [I], in fp8, and the scale of each row, float32 [M, 1]: about ``quantized *
    scale``. On a GPU with Triton in one pass over ``x``; a compiler fuses it with what makes ``x``."""
    if _TRITON and x.is_cuda and not torch.compiler.is_compiling() and x.shape[0]:
        from cogtune.model.fp8_kernel import quantize_on_gpu

        return quantize_on_gpu(x.contiguous(), column_scale, FORMAT, LARGEST, _SMALLEST)
    wide = x.float() if column_scale is None else x.float() * column_scale
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


def scaled_product(
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(a * scale_a) @ (b * scale_b).T + bias`` [M, N] of fp8 operands; scales are [M, 1] and [N, 1]."""
    if a_MK.is_cuda:
        # The public torch.nn.functional.scaled_mm has no lowering in torch 2.11's compiler (decision 10).
        return torch._scaled_mm(
            a_MK, b_NK.t(), scale_a=scale_a, scale_b=scale_b.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    product = (a_MK.float() @ b_NK.float().t()) * scale_a * scale_b.t()
    return (product if bias is None else product + bias.float()).to(dtype)


def _product(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    quantized, scale = quantize_rows(x_MI)
    return scaled_product(quantized, weight_OI.view(FORMAT), scale, scale_O[:, None], bias_O, x_MI.dtype)


def _gradient(
    gradient_MO: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, transposed_IO: torch.Tensor | None
) -> torch.Tensor:
    quantized, scale = quantize_rows(gradient_MO, scale_O)
    if transposed_IO is None:
        transposed_IO = weight_OI.t().contiguous()
    ones = torch.ones(transposed_IO.shape[0], 1, dtype=torch.float32, device=scale.device)
    return scaled_product(quantized, transposed_IO.view(FORMAT), scale, ones, None, gradient_MO.dtype)


class _FrozenProduct(torch.autograd.Function):
    """x W' + b, with a gradient for x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: torch.Tensor,
        weight_OI: torch.Tensor,
        scale_O: torch.Tensor,
        transposed_IO: torch.Tensor | None,
        bias_O: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, scale_O, transposed_IO)
        return _product(x_MI, weight_OI, scale_O, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_MO: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _gradient(gradient_MO, *ctx.saved_tensors), None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer with an fp8 weight.

    Its tensors hold bit patterns in integers, so that no cast of the model, by whomever, reaches them: ``weight`` uint8
    [O, I], ``scale_bits`` int32 [O] (float32), ``transposed`` uint8 [I, O] or None.
    """

    scale_bits: torch.Tensor
    transposed: torch.Tensor | None

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, *, keep_transposed: bool = False
    ) -> Fp8Linear:
        """Round a weight [O, I], on its device; the bias stays as it is.

        Raises:
            SetupError: a GPU that does not multiply fp8.
        """
        check_fp8(weight.device)
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=torch.bfloat16)
        quantized, scale = quantize_rows(weight.detach())
        bits = quantized.view(torch.uint8)
        layer.weight = nn.Parameter(bits, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.register_buffer("scale_bits", scale[:, 0].contiguous().view(torch.int32))
        layer.register_buffer("transposed", bits.t().contiguous() if keep_transposed else None)
        return layer

    def dequantized(self) -> torch.Tensor:
        """The rounded weight as float32 [O, I]."""
        return self.weight.view(FORMAT).float() * self.scale_bits.view(torch.float32)[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        if flat.shape[0] == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features) + 0 * x.sum()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        scale = self.scale_bits.view(torch.float32)
        product: torch.Tensor = _FrozenProduct.apply(flat, self.weight, scale, self.transposed, bias)
        return product.view(*x.shape[:-1], self.out_features)
