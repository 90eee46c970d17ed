"""Pictures: containers of every kind, damaged headers, files that end early. What a check passes, training decodes."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from cogtune.data.picture_headers import check_picture
from cogtune.data.problems import BadRecordError
from cogtune.processing.image import preprocess, read_image
from cogtune.processing.picture_formats import known_formats
from tests.fuzz.harness import Fault, Input, Place, Said, Session
from tests.fuzz.mutations import mutate_bytes

KINDS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "ICO", "ICNS", "EPS", "PDF", "JPEG2000",
"AVIF", "DIB",
         "MPO", "QOI", "SGI", "IM", "MSP", "SPIDER", "DDS", "BLP", "XBM")  # fmt: skip
MODES = ("RGB", "RGB", "L", "P", "RGBA", "1", "LA", "CMYK", "I;16", "I", "F", "YCbCr")
MOST_PIXELS = 4_000_000
STARTS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"\xd7\xcd\xc6\x9a", b"\0\0\1\0\1\0",
b"icns\0\0\1\0",
          b"P6 99999 99999 255\n", b"P5\n# x\n9 9\n65535\n", b"BM", b"GIF89a\xff\xff\xff\xff",
          b"RIFF\xff\xff\xff\xffWEBPVP8X",
          b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1\xff\xff", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff",
          b"8BPS\0\1", b"FLIF",
          b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x0cjP  \r\n\x87\n",
          b"qoif\xff\xff\xff\xff\xff\xff\xff\xff\4\0")  # fmt: skip


@dataclass
class PictureTarget:
    """One picture, seen by the check and by what training reads it with."""

    name: str = "picture"
    weight: int = 16

    def prepare(self, place: Place) -> None:
        Image.init()
        self.good: list[bytes] = []
        for number, kind in enumerate(KINDS):
            for mode in MODES[number % 2 :: 2] if kind not in ("JPEG", "PNG", "TIFF", "GIF", "WEBP") else MODES:
                if (data := encoded(kind, mode, Random(f"{kind} {mode}"))) is not None:
                    self.good.append(data)
        known_formats()

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        data = rng.choice(self.good)
        for mutation in given.mutations():
            choice = mutation.random()
            if choice < 0.35 and data.startswith(b"\x89PNG"):
                data = png_chunks(mutation, data)
            elif choice < 0.6:
                data = header_field(mutation, data)
            elif choice < 0.65:
                start = mutation.choice(STARTS)
                data = start + data[len(start) if mutation.random() < 0.5 else 0 :]
            else:
                data = mutate_bytes(mutation, data)
        suffix = rng.choice((".jpg", ".png", ".eps", ".ico", ".gif", ""))
        (place.input / f"data{suffix}").write_bytes(data)

    def run(self, given: Input, place: Place, session: Session) -> None:
        rng = given.rng
        file = next(place.input.iterdir())
        exif = rng.choice(("ignore", "apply"))

        def read() -> Any:
            return preprocess(read_image(file, max_pixels=MOST_PIXELS, exif=exif), 56)

        found = session.attempt(read, "read_image")
        checked = self.checked(session, file)
        if not checked.ok and found.ok:
            raise Fault(f"the check refuses ({checked.value}) what training reads")
        if (
            not checked.ok
            and checked.error != found.error
            and {checked.error, found.error} == {"image-too-large", "image-truncated"}
        ):
            raise Fault(
                f"the check says {checked.value}, training {found.error}: the limit of pixels holds in one alone"
            )

    def checked(self, session: Session, file: Any) -> Said:
        """The check of headers, which need not find what only decoding shows."""
        refused: list[BadRecordError] = []

        def check() -> None:
            try:
                check_picture(file, MOST_PIXELS)
            except BadRecordError as bad:
                refused.append(bad)

        said = session.attempt(check, "check_picture")
        return Said(2, refused[0].kind, "", "", refused[0].what) if refused else said


def encoded(kind: str, mode: str, rng: Random) -> bytes | None:
    """A small picture in a format and a mode; None where they do not go together."""
    size = (32, 32) if kind in ("ICO", "ICNS") else rng.choice(((9, 7), (32, 16), (1, 1), (64, 64)))
    try:
        image = Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)).convert(mode)
        stream = io.BytesIO()
        more: dict[str, Any] = {}
        if kind in ("GIF", "PNG", "WEBP", "TIFF") and rng.random() < 0.4:
            more = {"save_all": True, "append_images": [image.copy(), image.copy()]}
        if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.4:
            exif = Image.Exif()
            exif[0x0112] = rng.choice((1, 3, 6, 8, 0, 99))
            more["exif"] = exif
        if kind == "JPEG" and rng.random() < 0.4:
            more["progressive"] = True
        if kind == "TIFF" and rng.random() < 0.6:
            more["compression"] = rng.choice(("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"))
        image.save(stream, kind, **more)
        return stream.getvalue()
    except Exception:  # a format's writer refuses a mode with nearly any exception
        return None


def png_chunks(rng: Random, data: bytes) -> bytes:
    """Change a chunk of a PNG and mend its checksum, so that the change is read."""
    place, chunks = 8, []
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if length > len(data):
            return mutate_bytes(rng, data)
        chunks.append((kind, data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return data
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    match rng.randrange(6):
        case 0:
            body = mutate_bytes(rng, body)
        case 1:
            chunks.insert(number, (kind, body))
        case 2:
            kind, body = rng.choice(((b"tEXt", b"a\0" + b"x" * 100), (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**7)),
                                     (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 10**6)), (b"acTL", b"\xff" * 8),
                                     (b"eXIf", b"II*\0\xff\xff\xff\xff"),
                                     (b"fcTL", b"\0" * 26), (b"tRNS", b"\xff" * 300), (b"PLTE", b"ab"), (b"IEND",
                                     b"")))  # fmt: skip
            chunks.insert(number, (kind, body))
        case 3 if kind == b"IHDR":
            body = (
                struct.pack(">II", rng.choice((0, 1, 9, 70000, 2**31 - 1)), rng.choice((0, 1, 2000, 2**31 - 1)))
                + body[8:]
            )
        case 4:
            body = b""
        case _:
            kind = rng.choice((b"IDAT", b"IHDR", b"abcd", b"ABCD", b"\0\0\0\0"))
    chunks[number] = (kind, body)
    out = [data[:8]]
    for kind, body in chunks:
        out.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(out)


def header_field(rng: Random, data: bytes) -> bytes:
    """Write an extreme number over two or four of the first bytes."""
    place = rng.randrange(min(len(data), 96) + 1)
    number = rng.choice((0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 20000))
    form = rng.choice(("<H", ">H", "<I", ">I"))
    packed = struct.pack(form, number & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    return data[:place] + packed + data[place + len(packed) :]


TARGETS = (PictureTarget(),)
