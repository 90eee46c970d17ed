"""Index of picture files to pixel digests, so that a run need not decode a data set to find its features.

There are two lookups: by the file's stamp (path, size, times), and if that is unknown, as after copying a data set, by
the digest of the file's bytes. A stamp is trusted only if the file was last changed well before it was read, so that a
change within the clock's resolution cannot go unnoticed. It includes ``ctime``, which no tool can set back.

The index is a text file to which processes append, one line per picture, each with a checksum. Incomplete lines are
ignored, and losing the file costs only time.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features as pillow_features

from cogtune.data.records import ImageRef, file_of
from cogtune.features.ownership import INDEX_FILE, INDEX_FOLDER, checksum, index_fields, may_be_index
from cogtune.features.store import foreign, make_folder, write_atomically
from cogtune.processing.frames import FRAME_PREPROCESSING, Frame
from cogtune.processing.image import PREPROCESSING

_SETTLED_NANOSECONDS = 2_000_000_000


@dataclass(frozen=True)
class Stamp:
    """A file's path, size and times as a short text."""

    text: str
    settled: bool
    """Whether the file was unchanged for long enough that any later change must change the stamp."""

    @staticmethod
    def of(image: ImageRef) -> Stamp:
        path = file_of(image)
        status = os.stat(path)
        folder, name = os.path.split(path)
        name += frame_text(image)
        named = f"{_real(folder)}\0{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        return Stamp(
            checksum(named.encode("utf-8", "surrogateescape")), time.time_ns() - changed > _SETTLED_NANOSECONDS
        )


class PictureIndex:
    """The index of one cache folder for pictures preprocessed to ``image_size``; ``exif`` as in `read_image`."""

    def __init__(self, root: Path, image_size: int, exif: str = "ignore", bit_depth: str = "clip") -> None:
        jpeg = pillow_features.version("libjpeg_turbo") or pillow_features.version("jpg")
        turned = ("" if exif == "ignore" else f" exif {exif}") + ("" if bit_depth == "clip" else f" depth {bit_depth}")
        self._scope = checksum(f"{PREPROCESSING} {image_size} {PIL.__version__} {jpeg}{turned}".encode())
        self._root, self._path = root, root / INDEX_FOLDER / INDEX_FILE
        self._by_stamp: dict[str, str] = {}
        self._by_content: dict[str, str] = {}
        self._new: list[str] = []
        self._own = False
        lines = 0
        with suppress(FileNotFoundError), self._path.open(encoding="ascii", errors="replace") as file:
            for line in file:
                lines += 1
                self._take(line)
        self.compactable = lines > 1000 and lines > 2 * len(self._by_stamp)

    def find(self, stamp: Stamp) -> str | None:
        """Return the pixel digest of a file that has not changed since it was indexed."""
        return self._by_stamp.get(stamp.text)

    def find_content(self, content: str) -> str | None:
        """Return the pixel digest of a file with these bytes (`content_digest`), at any path."""
        return self._by_content.get(content)

    @property
    def has_contents(self) -> bool:
        """Return whether `find_content` could find anything."""
        return bool(self._by_content)

    def add(self, stamp: Stamp, content: str, pixels: str) -> None:
        """Add a picture; ``stamp`` was taken before the file was read."""
        self._by_content[content] = pixels
        if not stamp.settled:
            return
        self._by_stamp[stamp.text] = pixels
        fields = "\t".join((self._scope, stamp.text, content, pixels))
        self._new.append(f"{fields}\t{checksum(fields.encode())}\n")

    def flush(self) -> None:
        """Append new entries. Raises OSError, and FeatureCacheError if another file has the index's name."""
        if not self._new:
            return
        self._require_own()
        make_folder(self._path.parent, self._root)
        text = "".join(self._new).encode("ascii")
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            with suppress(PermissionError):  # another user's file: keep its permissions
                os.fchmod(descriptor, stat.S_IMODE(self._root.stat().st_mode) & 0o666)
            # start with a newline: a process killed while appending may have left half a line
            os.write(descriptor, b"\n" + text)
        finally:
            os.close(descriptor)
        self._new.clear()

    def compact(self) -> None:
        """Rewrite the file without repeated and incomplete lines; lines of other settings are kept."""
        self._require_own()
        kept: dict[tuple[str, str], str] = {}
        for line in self._path.read_text(encoding="ascii", errors="replace").splitlines():
            fields = index_fields(line)
            if fields is not None:
                kept[fields[0], fields[1]] = line + "\n"
        write_atomically(self._path, "".join(kept.values()).encode("ascii"), self._root)

    def _require_own(self) -> None:
        if not self._own and not may_be_index(self._path):
            raise foreign(self._path)
        self._own = True

    def _take(self, line: str) -> None:
        fields = index_fields(line)
        if fields is not None and fields[0] == self._scope:
            self._by_stamp[fields[1]] = self._by_content[fields[2]] = fields[3]


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    """Return the resolved folder, cached: pictures are in few folders, and resolving every file would dominate the
    time."""
    return os.path.realpath(folder)


def frame_text(image: ImageRef) -> str:
    """Return what tells a frame from others of its file; empty for a picture."""
    return f"\0frame {FRAME_PREPROCESSING} {image.index}" if isinstance(image, Frame) else ""


def image_content(image: ImageRef, file: str) -> str:
    """Return the digest of an image's content, from the `content_digest` of its file."""
    return checksum(f"{file}{frame_text(image)}".encode()) if isinstance(image, Frame) else file


def frame_digest(frame: npt.NDArray[np.uint8], image_size: int) -> str:
    """Return the digest of a frame before it is scaled: uint8 [height, width, 3]."""
    digest = hashlib.sha256(f"frame {FRAME_PREPROCESSING} {image_size} {frame.shape}\0".encode())
    digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()[:40]


def content_digest(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def pixel_digest(resized: npt.NDArray[np.uint8], image_size: int) -> str:
    """Return the digest of a picture as the tower sees it: uint8 [size, size, 3] after resizing."""
    digest = hashlib.sha256(f"{image_size}\0".encode())
    digest.update(np.ascontiguousarray(resized).data)
    return digest.hexdigest()[:40]
