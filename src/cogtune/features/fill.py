"""Run the tower on the pictures whose features are missing.

Reader threads decode and preprocess (Pillow, NumPy and hashing release the GIL), the device computes, and writer
threads write; only a few pictures are in memory at a time. Written files are kept, so an interrupted fill resumes where
it stopped.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import torch

from cogtune.data.pixels import reader_pool
from cogtune.data.records import ImageRef, file_of
from cogtune.errors import CogtuneError, DataError
from cogtune.features.file_format import relative_error
from cogtune.features.index import (
    PictureIndex,
    Stamp,
    content_digest,
    frame_digest,
    image_content,
    pixel_digest,
)
from cogtune.features.store import Store
from cogtune.language import tr
from cogtune.processing.clip import decode
from cogtune.processing.frames import Frame, preprocess_frame
from cogtune.processing.image import normalise, read_image, resize

Tower = Callable[[torch.Tensor], torch.Tensor]
"""Pixels [N, 3, side, side] on the device -> features [N, Q, W]: `VisionModel.features`."""
_AHEAD = 4  # batches that are decoded ahead of the device, and batches that wait for the disk


@dataclass(frozen=True)
class Decoded:
    """A picture in the pipeline; ``pixels`` is None if its features already exist."""

    image: ImageRef
    stamp: Stamp
    content: str
    digest: str
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class Bad:
    """Images of a file that cannot be read, and why."""

    images: list[ImageRef]
    error: DataError


@dataclass
class Filled:
    """Work done so far by this rank. ``digests``: path -> digest of the pixels."""

    digests: dict[str, str] = field(default_factory=dict)
    computed: int = 0
    found: int = 0
    bad: list[Bad] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """||stored - features|| / ||features|| of each computed picture, if the stored dtype is narrower."""
    seconds: float = 0.0


@dataclass(frozen=True)
class FillSettings:
    """``batch``: pictures per forward pass. ``skip_bad``: list pictures that cannot be read and continue."""

    image_size: int
    max_pixels: int | None
    exif: str = "ignore"
    bit_depth: str = "clip"
    batch: int = 1
    workers: int = 4
    skip_bad: bool = False
    measure_error: bool = False


class Filler:
    """Computes and stores the features of ``images``, a few at a time; use it as a context manager.

    Args:
        device: the tower's device; on CUDA a batch computes while the previous one is copied back and written.
    """

    def __init__(
        self,
        images: Sequence[ImageRef],
        tower: Tower,
        store: Store,
        index: PictureIndex,
        settings: FillSettings,
        device: torch.device,
    ) -> None:
        self.filled = Filled()
        self._tower, self._store, self._index, self._settings, self._device = tower, store, index, settings, device
        # threads start on CUDA device 0, where pinning memory would create a context
        choose = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._readers = reader_pool(max(1, settings.workers), choose)
        self._writers = ThreadPoolExecutor(2, "cogtune-write")
        self._decoded = self._decode(images)
        self._waiting: list[Decoded] = []
        self._underway: deque[tuple[list[Decoded], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._writing: deque[Future[tuple[str, float | None]]] = deque()
        self._started: set[str] = set()

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown(wait=True, cancel_futures=True)

    def advance(self, pictures: int) -> bool:
        """Process up to ``pictures`` more; return whether any are left.

        Raises:
            DataError: a picture that cannot be read, unless ``skip_bad``.
            OSError: a file could not be written; what was written before stays.
        """
        began, left = time.perf_counter(), True
        for _ in range(pictures):
            decoded = next(self._decoded, None)
            if decoded is None:
                left = False
                break
            self._take(decoded)
        if not left:
            self._launch()
            self._collect(0)
            self._settle(0)
        self._index.flush()
        self.filled.seconds += time.perf_counter() - began
        return left

    def _decode(self, images: Sequence[ImageRef]) -> Iterator[Decoded | Bad]:
        """Yield pictures in order, decoding ahead: a picture or the frames of a clip at a time."""
        ahead: deque[tuple[int, Future[list[Decoded | Bad]]]] = deque()
        most, under_way = self._settings.workers + _AHEAD * self._settings.batch, 0
        for _, several in groupby(images, file_of):
            group = list(several)
            ahead.append((len(group), self._readers.submit(self._decode_file, group)))
            under_way += len(group)
            while under_way > most and len(ahead) > self._settings.workers:
                count, future = ahead.popleft()
                yield from future.result()
                under_way -= count
        while ahead:
            yield from ahead.popleft()[1].result()

    def _decode_file(self, images: list[ImageRef]) -> list[Decoded | Bad]:
        """Decode the images of one file. Runs in a thread."""
        try:
            stamps, file = _identify(images)
            found = [self._known(*one, file) for one in zip(images, stamps, strict=True)]
            new = [image for image, known in zip(images, found, strict=True) if known is None]
            pixels = self._pixels(new)
            return [
                known or Decoded(image, stamp, image_content(image, file), *next(pixels))
                for image, stamp, known in zip(images, stamps, found, strict=True)
            ]
        except DataError as error:
            return [Bad(images, error)]

    def _known(self, image: ImageRef, stamp: Stamp, file: str) -> Decoded | None:
        content = image_content(image, file)
        digest = self._index.find_content(content)
        return Decoded(image, stamp, content, digest, None) if digest and self._store.has(digest) else None

    def _pixels(self, images: list[ImageRef]) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield each image's digest, and its pixels if its features are not stored."""
        settings, size = self._settings, self._settings.image_size
        frames = decode([image for image in images if isinstance(image, Frame)])
        for image in images:
            if isinstance(image, Frame):
                frame = next(frames)
                digest = frame_digest(frame, size)
                pixels = None if self._store.has(digest) else preprocess_frame(frame, size)
            else:
                resized = resize(
                    read_image(image, max_pixels=settings.max_pixels, exif=settings.exif, bit_depth=settings.bit_depth),
                    size,
                )
                digest = pixel_digest(resized, size)
                pixels = None if self._store.has(digest) else normalise(resized)
            pinned = pixels is not None and self._device.type == "cuda"
            yield digest, pixels.pin_memory() if pixels is not None and pinned else pixels

    def _take(self, decoded: Decoded | Bad) -> None:
        if isinstance(decoded, Bad):
            if not self._settings.skip_bad:
                raise decoded.error
            self.filled.bad.append(decoded)
            return
        self._index.add(decoded.stamp, decoded.content, decoded.digest)
        self.filled.digests[str(decoded.image)] = decoded.digest
        # another process may have written it meanwhile, and two files may hold the same picture
        if decoded.pixels is None or decoded.digest in self._started or self._store.has(decoded.digest):
            self._store.touch(decoded.digest)  # mark as used, so that this run's lease covers it
            self.filled.found += 1
            return
        self._started.add(decoded.digest)
        self._waiting.append(decoded)
        if len(self._waiting) >= self._settings.batch:
            self._launch()

    def _launch(self) -> None:
        """Launch the tower on the waiting pictures; collect the previous batch while it runs."""
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        pixels = [decoded.pixels for decoded in batch if decoded.pixels is not None]
        with torch.no_grad():
            features = self._tower(torch.stack([one.to(self._device, non_blocking=True) for one in pixels]))
            if self._device.type != "cuda":
                self._underway.append((batch, features, None))
            else:
                host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
                host.copy_(features, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
                self._underway.append((batch, host, done))
        self._collect(1)

    def _collect(self, leave: int) -> None:
        """Pass finished batches to the writers."""
        while len(self._underway) > leave:
            batch, features, done = self._underway.popleft()
            if done is not None:
                done.synchronize()
            for decoded, one in zip(batch, features, strict=True):
                self._writing.append(self._writers.submit(self._write, decoded.digest, one))
        self._settle(_AHEAD * self._settings.batch)

    def _write(self, digest: str, features_QW: torch.Tensor) -> tuple[str, float | None]:
        """Write one picture's features. Runs in a thread."""
        if not bool(torch.isfinite(features_QW).all()):
            raise CogtuneError(
                tr("the tower's output for a picture is not finite (pixels {digest})", digest=digest),
                hint=tr(
                    "the tower's weights may be damaged, or the number format too narrow: try model.dtype bfloat16"
                ),
                code="cache-not-finite",
            )
        self._store.write(digest, features_QW)
        measured = relative_error(features_QW, self._store.layout) if self._settings.measure_error else None
        return digest, measured

    def _settle(self, leave: int) -> None:
        """Wait until at most ``leave`` writes are pending; raises a writer's error."""
        while len(self._writing) > leave:
            _, measured = self._writing.popleft().result()
            self.filled.computed += 1
            if measured is not None:
                self.filled.errors.append(measured)


def _identify(images: Sequence[ImageRef]) -> tuple[list[Stamp], str]:
    """Return the stamps of one file's images, taken before the file is read, and its digest."""
    file = file_of(images[0])
    try:
        return [Stamp.of(image) for image in images], content_digest(file)
    except OSError as error:
        raise DataError(
            tr("{image}: the picture cannot be read ({error})", image=file, error=error),
            hint=tr("check the path and the file's permissions"),
            code="image-missing" if isinstance(error, FileNotFoundError) else "image-unreadable",
        ) from error
