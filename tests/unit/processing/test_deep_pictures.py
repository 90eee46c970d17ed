"""Pictures with more than 8 bits a channel are counted, said, and brought into range where that is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogtune.data.check import check
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from cogtune.processing.image import read_image
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import dialogue, section, write_label

RAMP = np.arange(256).reshape(16, 16)
DEEP = {
    "16.png": (RAMP * 257).astype(np.uint16),
    "16.tif": (RAMP * 16).astype(np.uint16),
    "32.tif": (RAMP * 100000 - 5000000).astype(np.int32),
    "float.tif": (RAMP / 255).astype(np.float32),
}


def write(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DEEP[name]).save(folder / name)
    return folder / name


@pytest.mark.parametrize("name", DEEP)
def test_scaled_to_the_8_bit_twin(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    clipped = np.asarray(read_image(path))
    assert np.array_equal(clipped, np.asarray(Image.open(path).convert("RGB"))), "as the published code, unless asked"
    scaled = np.asarray(read_image(path, bit_depth="scale"))
    assert np.array_equal(scaled, np.repeat(RAMP[..., None], 3, axis=2))


def test_odd_values(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf], [1.0, 3.0]], np.float32)
    for number, array in enumerate((values, np.full((2, 2), np.nan, np.float32), np.full((2, 2), 7, np.uint16))):
        path = tmp_path / f"{number}.tif"
        Image.fromarray(array).save(path)
        found = np.asarray(read_image(path, bit_depth="scale"))[..., 0]
        assert found.tolist() == ([[0, 0], [0, 255]] if number == 0 else [[0, 0], [0, 0]])


def test_pictures_of_8_bits_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray((RAMP // 3 + 20).astype(np.uint8)).save(path)
    assert np.array_equal(np.asarray(read_image(path, bit_depth="scale")), np.asarray(read_image(path)))


def test_counted_and_said(tmp_path: Path) -> None:
    for name in DEEP:
        stem = name.replace(".", "-")
        write(tmp_path / "images", name).rename(tmp_path / "images" / f"{stem}{Path(name).suffix}")
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_label(tmp_path / "labels" / f"{stem}.json", dialogue("q", "a"))
    _, report = read_sources(section(tmp_path))
    assert report.deep == 4
    assert any(line.startswith("warning: 4 pictures have more than 8 bits") for line in report.lines())
    found = check(section(tmp_path), 0, find_token_file(None))
    assert [finding.code for finding in found.warnings if "bit_depth" in finding.what] == ["deep-pictures"]
    assert found.counts["deep"] == 4
    lines = read_sources(section(tmp_path, bit_depth="scale"))[1].lines()
    assert any("scaled to 8" in line for line in lines)
    assert not any(line.startswith("warning") for line in lines)


@pytest.mark.parametrize("address", ["https://example.com/x.png", "file:///tmp/x.png"])
def test_an_address_is_called_one(address: str) -> None:
    with pytest.raises(DataError, match="a web address or URL") as caught:
        read_image(address)
    assert caught.value.code == "image-url"
