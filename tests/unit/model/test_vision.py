"""Parts of the vision tower against torch's own."""

from __future__ import annotations

import torch
from torch.nn import functional

from cogtune.model.vision import PatchProjection, _gelu


def test_patches_are_projected_as_the_convolution_does() -> None:
    torch.manual_seed(0)
    projection = PatchProjection(3, 10, 4, stride=4)
    pixels = torch.randn(2, 3, 12, 12)
    wanted = functional.conv2d(pixels, projection.weight, projection.bias, stride=4)
    assert projection(pixels).shape == wanted.shape
    torch.testing.assert_close(projection(pixels), wanted)
    assert projection(pixels[:0]).shape == (0, 10, 3, 3)  # sharded models run a batch without pictures too


def test_the_compiled_gelu_is_the_exact_one_to_rounding() -> None:
    """Against float64, for every bfloat16 number up to 12 in size: never further off than half a unit of bfloat16 and
    the error that torch's own float32 formula has."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.abs() <= 12]
    exact = x.double() * torch.special.ndtr(x.double())
    with torch.no_grad():
        found = torch.compile(_gelu, backend="aot_eager", fullgraph=True)(x)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).abs()
    theirs = (functional.gelu(x.float()).double() - exact).abs().max()
    assert (error <= exact.abs() * 2.0**-8 * 1.01 + theirs).all()
    assert error.max() <= (functional.gelu(x).double() - exact).abs().max() * 1.01
    assert torch.equal(_gelu(x), functional.gelu(x))  # not compiled
