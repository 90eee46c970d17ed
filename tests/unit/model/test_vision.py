"""Parts of the vision tower against torch's own."""

from __future__ import annotations

import torch
from torch.nn import functional

from cogtune.model.vision import PatchProjection


def test_patches_are_projected_as_the_convolution_does() -> None:
    torch.manual_seed(0)
    projection = PatchProjection(3, 10, 4, stride=4)
    pixels = torch.randn(2, 3, 12, 12)
    wanted = functional.conv2d(pixels, projection.weight, projection.bias, stride=4)
    assert projection(pixels).shape == wanted.shape
    torch.testing.assert_close(projection(pixels), wanted)
    assert projection(pixels[:0]).shape == (0, 10, 3, 3)  # sharded models run a batch without pictures too
