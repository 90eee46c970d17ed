"""Frozen linear layers in fp8 (e4m3): half the memory of bfloat16, and faster on GPUs with fp8 matrix units.

Shapes: M tokens, I input and O output features. The weight [O, I] is quantised once, with one scale per output feature.
Inputs and gradients are quantised on the fly, with one scale per token. The GPU accumulates products in higher
precision and scales them back. A row's largest element becomes e4m3's largest number, so the relative rounding error is
up to 1/16 per element.

The gradient of the input uses the same quantised weight. Its scales belong to the output features, over which that
product sums, so they are multiplied into the incoming gradient first. The fp8 product needs its second operand
contiguous along the summed features, so the backward pass needs the transposed weight. It is either transposed on the
fly or kept (``keep_transposed``), which is faster and takes as much memory in total as bfloat16.

Between the layers of an MLP only quantised values are needed, so activation and quantisation are fused: in
`frozen_gated_mlp`, whose gradients are fused too, and in `Fp8Linear.of_gelu`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cogtune.configuration.resolve import require_fp8
from cogtune.model.compiler_workarounds import cast_unless_same
from cogtune.model.kernels import HAS_TRITON, kernel_available
from cogtune.system.gpu import gpu_of

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
_SMALLEST = 1e-12  # lower bound of a row's largest element, so that a row of zeros stays zeros
if HAS_TRITON:
    from cogtune.model.kernels import fp8


def quantize_rows(x: torch.Tensor, column_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` [M, I], times ``column_scale`` [I], to fp8 with a float32 scale per row [M, 1].

    ``x`` is about ``quantized * scale``. On a GPU with Triton this is one pass over ``x``; a compiler fuses it with the
    kernel that produces ``x``.
    """
    if kernel_available(x) and not torch.compiler.is_compiling() and x.shape[0]:
        return fp8.quantize_on_gpu(x.contiguous(), column_scale, FORMAT, LARGEST, _SMALLEST)
    wide = x.float() if column_scale is None else x.float() * column_scale
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


def _fits_kernel(x: torch.Tensor) -> bool:
    return kernel_available(x) and x.shape[1] <= fp8.WIDEST


def rounded_gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the exact GELU to ``x`` [M, I] and `quantize_rows`, without rounding to x's dtype in between."""
    if _fits_kernel(x):
        quantized, scale = fp8.gelu_on_gpu(x.contiguous(), FORMAT, LARGEST, _SMALLEST)
        return quantized, scale
    return quantize_rows(functional.gelu(x.float()))


def rounded_gated(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `quantize_rows` to silu(``gate``) * ``up``, both [M, I], without rounding the product to their dtype
    first."""
    if _fits_kernel(gate):
        quantized, scale = fp8.gated_on_gpu(gate.contiguous(), up.contiguous(), FORMAT, LARGEST, _SMALLEST)
        return quantized, scale
    return quantize_rows(functional.silu(gate.float()) * up.float())


def rounded_gated_gradients(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gate_scale: torch.Tensor, up_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the quantised gradients of ``gate`` and ``up`` [M, I], given that of silu(gate) * up.

    They are quantised by `quantize_rows` with the column scales [I]: quantised gate, its scales, quantised up, its
    scales.
    """
    if _fits_kernel(gate):
        one, two, three, four = fp8.gated_gradient_on_gpu(
            gradient.contiguous(), gate, up, gate_scale, up_scale, FORMAT, LARGEST, _SMALLEST
        )
        return one, two, three, four
    wide, sigmoid = gate.float(), torch.sigmoid(gate.float())
    incoming = gradient.float() * sigmoid
    to_gate = quantize_rows(incoming * up.float() * (1 + wide * (1 - sigmoid)), gate_scale)
    return *to_gate, *quantize_rows(incoming * wide, up_scale)


def scaled_product(
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``(a * scale_a) @ (b * scale_b).T + bias`` [M, N] of fp8 operands; scales are [M, 1] and [N, 1]."""
    if a_MK.is_cuda:
        # The public torch.nn.functional.scaled_mm has no lowering in torch 2.11's compiler (decision 10).
        return torch._scaled_mm(
            a_MK, b_NK.t(), scale_a=scale_a, scale_b=scale_b.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    product = (a_MK.float() @ b_NK.float().t()) * scale_a * scale_b.t()
    return cast_unless_same(product if bias is None else product + bias.float(), dtype)


def _product(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    quantized, scale = quantize_rows(x_MI)
    return scaled_product(quantized, weight_OI.view(FORMAT), scale, scale_O[:, None], bias_O, x_MI.dtype)


def _gradient(
    gradient_MO: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    transposed_IO: torch.Tensor | None,
    ones_I: torch.Tensor,
) -> torch.Tensor:
    quantized, scale = quantize_rows(gradient_MO, scale_O)
    return _gradient_of_rounded(quantized, scale, weight_OI, transposed_IO, ones_I, gradient_MO.dtype)


def _gradient_of_rounded(
    quantized_MO: torch.Tensor,
    scale_M1: torch.Tensor,
    weight_OI: torch.Tensor,
    transposed_IO: torch.Tensor | None,
    ones_I: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    if transposed_IO is None:
        transposed_IO = weight_OI.t().contiguous()
    return scaled_product(quantized_MO, transposed_IO.view(FORMAT), scale_M1, ones_I[:, None], None, dtype)


class _FrozenProduct(torch.autograd.Function):
    """``x W' + b`` with a gradient for x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: torch.Tensor,
        weight_OI: torch.Tensor,
        scale_O: torch.Tensor,
        transposed_IO: torch.Tensor | None,
        ones_I: torch.Tensor,
        bias_O: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, scale_O, transposed_IO, ones_I)
        return _product(x_MI, weight_OI, scale_O, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradient(gradient_MO, *ctx.saved_tensors), *([None] * 5)


class _FrozenGatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with a gradient for x alone. Saves gate(x) and up(x).

    A layer is four arguments: weight, scale, transposed weight or None, ones.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, *layers: Any) -> torch.Tensor:
        gate_ID, gate_scale, _, _, up_ID, up_scale, _, _, down_DI, down_scale, _, _ = layers
        quantized, scale = quantize_rows(x_MD)
        gate = scaled_product(quantized, gate_ID.view(FORMAT), scale, gate_scale[:, None], None, x_MD.dtype)
        up = scaled_product(quantized, up_ID.view(FORMAT), scale, up_scale[:, None], None, x_MD.dtype)
        ctx.save_for_backward(gate, up, *layers)
        inner, inner_scale = rounded_gated(gate, up)
        return scaled_product(inner, down_DI.view(FORMAT), inner_scale, down_scale[:, None], None, x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_MD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, gate_ID, gate_scale, gate_DI, gate_ones, up_ID, up_scale, up_DI, up_ones, *down = ctx.saved_tensors
        inner = _gradient(gradient_MD, *down)
        to_gate, gate_rows, to_up, up_rows = rounded_gated_gradients(inner, gate, up, gate_scale, up_scale)
        dtype = gradient_MD.dtype
        through_gate = _gradient_of_rounded(to_gate, gate_rows, gate_ID, gate_DI, gate_ones, dtype)
        return through_gate + _gradient_of_rounded(to_up, up_rows, up_ID, up_DI, up_ones, dtype), *([None] * 12)


def frozen_gated_mlp(x: torch.Tensor, gate: Fp8Linear, up: Fp8Linear, down: Fp8Linear) -> torch.Tensor:
    """Return down(silu(gate(x)) * up(x)) for x [..., D] and layers without biases."""
    flat = x.flatten(0, -2)
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], down.out_features) + 0 * x.sum()
    parts = [part for layer in (gate, up, down) for part in layer.parts()]
    found: torch.Tensor = _FrozenGatedMLP.apply(flat, *parts)
    return found.view(*x.shape[:-1], down.out_features)


class Fp8Linear(nn.Linear):
    """A frozen linear layer with an fp8 weight.

    Its tensors hold bit patterns as integers, so that no cast of the model changes them: ``weight`` uint8 [O, I],
    ``scale_bits`` int32 [O] (float32), ``transposed`` uint8 [I, O] or None. ``ones_bits`` int32 [I] are the second
    scales of the backward product; keeping them saves a kernel launch per product.
    """

    scale_bits: torch.Tensor
    ones_bits: torch.Tensor
    transposed: torch.Tensor | None

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, *, keep_transposed: bool = False
    ) -> Fp8Linear:
        """Quantise a weight [O, I] on its device; the bias stays unchanged.

        Raises:
            SetupError: a GPU that does not multiply fp8.
        """
        quantized, scale = quantize_rows(weight.detach())
        layer = cls.from_codes(quantized.view(torch.uint8), scale[:, 0].contiguous(), keep_transposed=keep_transposed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def from_codes(cls, bits: torch.Tensor, scale: torch.Tensor, *, keep_transposed: bool = False) -> Fp8Linear:
        """Build a layer without bias from the bit patterns uint8 [O, I] and scales float32 [O] of its weight.

        Raises:
            SetupError: a GPU that does not multiply fp8.
        """
        require_fp8(gpu_of(bits.device))
        layer = cls(bits.shape[1], bits.shape[0], False, device="meta", dtype=torch.bfloat16)
        layer.weight = nn.Parameter(bits, requires_grad=False)
        layer.register_buffer("scale_bits", scale.view(torch.int32))
        ones = torch.ones(bits.shape[1], dtype=torch.float32, device=bits.device)
        layer.register_buffer("ones_bits", ones.view(torch.int32), persistent=False)
        layer.register_buffer("transposed", bits.t().contiguous() if keep_transposed else None)
        return layer

    @property
    def scale(self) -> torch.Tensor:
        """The weight's scales, float32 [O]."""
        return self.scale_bits.view(torch.float32)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the arguments of a product and its gradient: weight, scale, transposed weight, ones."""
        return self.weight, self.scale, self.transposed, self.ones_bits.view(torch.float32)

    def large_tensors(self) -> list[tuple[Any, str]]:
        """Return where the tensors of the layer's size are: an object and its attribute each."""
        names = ["weight"] if self.transposed is None else ["weight", "transposed"]
        return [(self, name) for name in names]

    def dequantized(self) -> torch.Tensor:
        """Return the quantised weight as float32 [O, I]."""
        return self.weight.view(FORMAT).float() * self.scale[:, None]

    def of_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for the exact GELU of x [..., I]. Has no gradient."""
        flat = x.flatten(0, -2)
        if flat.shape[0] == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self._of_rounded(rounded_gelu(flat), x)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x [..., I]. Has no gradient.

        In a compiled layer `forward` leaves the rounding to the compiler, which fuses it with what makes x. Where that
        is no generated kernel, one pass over x by a kernel of its own is faster.
        """
        flat = x.flatten(0, -2)
        if not _fits_kernel(flat) or flat.shape[0] == 0:
            return self(x)
        return self._of_rounded(fp8.quantize_on_gpu(flat.contiguous(), None, FORMAT, LARGEST, _SMALLEST), x)

    def _of_rounded(self, rounded: tuple[torch.Tensor, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Return the output [..., O] for rounded rows, in the dtype and leading dimensions of ``like``."""
        bias = None if self.bias is None else self.bias.to(like.dtype)
        scales = rounded[1], self.scale[:, None]
        product = scaled_product(rounded[0], self.weight.view(FORMAT), *scales, bias, like.dtype)
        return product.view(*like.shape[:-1], self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        if flat.shape[0] == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features) + 0 * x.sum()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: torch.Tensor = _FrozenProduct.apply(flat, *self.parts(), bias)
        return product.view(*x.shape[:-1], self.out_features)
