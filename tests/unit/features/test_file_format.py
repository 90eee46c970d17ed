"""Feature files: what goes in comes out, and anything else is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtune.features.file_format import DamagedError, Layout, pack, relative_error, unpack

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NAME = "variant/picture"


def features(cells: int = 6, width: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With channels of very different sizes, as a tower's output has."""
    draw = torch.randn(cells, width, generator=torch.Generator().manual_seed(0))
    return (draw * torch.logspace(-3, 2, width)).to(dtype)


@pytest.mark.parametrize("stored", FORMATS)
def test_stored_in_their_own_format_nothing_is_lost(stored: str) -> None:
    given = features(dtype=FORMATS[stored])
    back = unpack(bytearray(pack(given, Layout(6, 256, stored), NAME)), Layout(6, 256, stored), NAME)
    assert back.dtype == given.dtype
    assert torch.equal(back, given)


@pytest.mark.parametrize("width", [256, 96])
def test_float8_errs_by_half_a_step_of_its_three_bits_at_most(width: int) -> None:
    """Normal float8_e4m3 numbers are within 1/16 of what they stand for; those below 2^-6 of 448 times the scale, that
    is below about 1/28,000 of their group's largest, are within half of float8's smallest step."""
    given, layout = features(width=width), Layout(6, width, "float8")
    back = unpack(bytearray(pack(given, layout, NAME)), layout, NAME)
    group = given.unflatten(1, (layout.groups, -1)).abs().amax(-1, keepdim=True)
    allowed = torch.maximum(given.unflatten(1, (layout.groups, -1)).abs() / 16, group / 448 * 2**-10)
    assert ((back - given).unflatten(1, (layout.groups, -1)).abs() <= allowed * 1.0001).all()
    measured = float((back - given).double().norm() / given.double().norm())
    assert relative_error(given, layout) == pytest.approx(measured, rel=1e-6)
    assert 0.01 < measured < 0.04  # uniform rounding of a 3-bit mantissa: about 2.6 %


def test_a_picture_of_nothing_stores() -> None:
    layout = Layout(4, 128, "float8")
    assert torch.equal(unpack(bytearray(pack(torch.zeros(4, 128), layout, NAME)), layout, NAME), torch.zeros(4, 128))


@pytest.mark.parametrize("stored", [*FORMATS, "float8"])
def test_the_size_is_known_beforehand_and_other_programs_can_read_the_file(stored: str, tmp_path: Path) -> None:
    layout = Layout(6, 256, stored)
    content = pack(features(), layout, NAME)
    assert len(content) == layout.file_bytes
    (tmp_path / "one.safetensors").write_bytes(content)
    loaded = load_file(tmp_path / "one.safetensors")
    assert loaded["features"].shape == (6, 256)
    assert ("scales" in loaded) == (stored == "float8")


@pytest.mark.parametrize("place", [0, 20, 300, 1024, 2000, -1])
def test_a_flipped_bit_is_noticed_wherever_it_is(place: int) -> None:
    layout = Layout(6, 256, "bfloat16")
    content = bytearray(pack(features(), layout, NAME))
    content[place] ^= 1
    with pytest.raises(DamagedError):
        unpack(content, layout, NAME)


def test_a_torn_file_and_one_of_another_picture_are_noticed() -> None:
    layout = Layout(6, 256, "bfloat16")
    content = pack(features(), layout, NAME)
    for wrong in (content[:-1], content[:100], b"", content + b"\0", bytes(len(content))):
        with pytest.raises(DamagedError):
            unpack(bytearray(wrong), layout, NAME)
    with pytest.raises(DamagedError):
        unpack(bytearray(content), layout, "variant/another")
    with pytest.raises(DamagedError):
        unpack(bytearray(content), Layout(6, 256, "float16"), NAME)
