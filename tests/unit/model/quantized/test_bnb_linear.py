"""Quantised layers under the compiler: outputs and gradients of the layer itself, in every format it computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")

from cogtune.model.quantized.bnb_linear import to_four_bit, to_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_compiled_layer_passes_the_gradient_on(form: str, bias: bool, dtype: torch.dtype) -> None:
    """torch 2.11 lost it, without a word, where a function ended in a conversion that changes nothing."""
    torch.manual_seed(0)
    layer = {"int8": to_int8, "nf4": to_four_bit}[form](nn.Linear(128, 192, bias=bias).to(dtype))
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
    results = []
    for function in (layer, compiled):
        x = torch.randn(20, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = function(x)
        out.sum().backward()
        assert x.grad is not None
        assert float(x.grad.norm()) > 0
        results.append((out.detach(), x.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # sums in bfloat16 differ in their last place
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
