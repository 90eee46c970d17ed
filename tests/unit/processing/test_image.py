from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogtune.errors import DataError
from cogtune.processing.image import normalise, preprocess, read_image
from cogtune.processing.picture_formats import known_formats
from cogtune.processing.pixels import resized_of


def formula(width: int, height: int, value) -> Image.Image:
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray((value(x, y, c) % 256).astype(np.uint8))


UPSCALED = formula(5, 4, lambda x, y, c: 37 * x + 59 * y + 83 * c)
DOWNSCALED = formula(50, 40, lambda x, y, c: 7 * x * x + 11 * y * y + 29 * c + 3 * x * y)


def as_uint8(pixels: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return ((pixels * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)


def test_published_fixture_enlarged():
    pixels = preprocess(UPSCALED, 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    row = [(0, 75, 156), (8, 91, 183), (34, 117, 224), (57, 140, 255)]
    row += [(81, 163, 193), (104, 186, 24), (130, 226, 26), (146, 253, 56)]
    assert [tuple(p) for p in as_uint8(pixels)[0].tolist()] == row
    expected = [
        [-1.792263, -1.675475, -1.295916, -0.960152],
        [-0.626514, -0.38639, 0.003812, 0.348991],
        [0.738111, 1.122052, 1.705075, 2.145897],
    ]
    torch.testing.assert_close(pixels[:, 0, :4], torch.tensor(expected), atol=1e-6, rtol=0)  # printed to 6 digits


def test_published_fixture_reduced():
    rows = as_uint8(preprocess(DOWNSCALED, 8)).tolist()
    assert (rows[0][0], rows[0][3], rows[7][7]) == ([114, 113, 134], [133, 115, 121], [132, 129, 135])


@pytest.mark.parametrize("size", [8, 56, 224])
def test_bit_equal_to_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms")
    published = transforms.Compose(
        [
            transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (123, 77, 3), dtype=np.uint8))
    for image in (UPSCALED, DOWNSCALED, noise, noise.resize((size, size))):
        assert torch.equal(preprocess(image, size), published(image))


def test_a_picture_of_the_right_size_is_taken_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    found = resized_of(picture, 8)
    assert np.array_equal(found, noise)
    assert torch.equal(preprocess(picture, 8), normalise(noise))
    found[:] = 0
    assert np.array_equal(np.asarray(picture), noise)  # the user's picture is no part of it


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "gif", "tiff", "TIF", "webp", "ppm", "tga", "jp2", "JPG"])
def test_reads_any_format_whatever_the_case_of_its_suffix(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    DOWNSCALED.resize((48, 48)).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (48, 48))
    assert preprocess(image, 8).isfinite().all()


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(tmp_path, form):
    path = tmp_path / "animation"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    frames[0].save(
        path, format=form, save_all=True, append_images=frames[1:], **({} if form != "WEBP" else {"lossless": True})
    )
    image = read_image(path)
    assert image.getpixel((3, 3)) == (255, 0, 0)
    assert image.resize((4, 4)).getpixel((0, 0)) == (255, 0, 0)  # usable after the file is closed


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_goes_through_pillows_conversion(tmp_path, mode):
    source = Image.new(mode, (6, 5), 1)
    path = tmp_path / "picture.tiff"
    source.save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert image.tobytes() == source.convert("RGB").tobytes()


def test_orientation_of_a_photograph_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert read_image(path).size == (30, 20)


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size with a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(form: str, **options) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, form, **options)
    return stream.getvalue()


JPEG, PNG, TIFF = encoded("JPEG"), encoded("PNG"), encoded("TIFF", compression="tiff_lzw")
BAD = {
    "empty": (b"", "image-empty"),
    "text": (b"this is no picture", "image-unreadable"),
    "json": (b'{"conversations": []}', "image-unreadable"),
    "jpeg header only": (JPEG[:20], "image-"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "image-truncated"),
    "half a png": (PNG[: len(PNG) // 2], "image-truncated"),
    "half a tiff": (TIFF[: len(TIFF) // 2], "image-"),
    "damaged png": (PNG[:200] + bytes(80) + PNG[280:], "image-truncated"),
    "bomb": (png_header(20_000, 20_000), "image-too-large"),
    "pixels missing": (png_header(1000, 1000), "image-truncated"),
}
JP2 = encoded("JPEG2000")
if "JPEG2000" in known_formats():  # a box of 2**62 bytes
    BAD["jpeg 2000 with a box beyond memory"] = (
        JP2[:20] + b"\0\0\0\1jp2h\x40" + bytes(7) + JP2[28:],
        "image-unreadable",
    )
if "AVIF" in known_formats():  # its plugin answers a header without its tables with a RuntimeError
    BAD["avif without its items"] = (encoded("AVIF").replace(b"pitm", b"free"), "image-unreadable")


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_say_where_what_and_what_to_do(tmp_path, name):
    content, code = BAD[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # would be a second, vaguer message
        with pytest.raises(DataError) as caught:
            read_image(path)
    assert caught.value.code.startswith(code)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert caught.value.code == "image-missing"


def test_the_limit_of_pixels_is_the_callers(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    Image.new("RGB", (100, 50)).save(path)
    assert read_image(path, max_pixels=5000).size == (100, 50)
    with pytest.raises(DataError, match="100 x 50 pixels, the limit is 4999"):
        read_image(path, max_pixels=4999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # refuses 5000 by itself
    with pytest.raises(DataError, match="too large"):
        read_image(path)
    assert read_image(path, max_pixels=5000).size == (100, 50)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(30_000, 30_000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError) as caught:
        read_image(Path(path), max_pixels=10**8)
    assert caught.value.code == "image-too-large"
