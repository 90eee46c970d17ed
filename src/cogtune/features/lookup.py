"""Look up which of a run's pictures have features already; every process looks up its share."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cogtune.data.picture_headers import in_threads
from cogtune.data.records import ImageRef, file_of
from cogtune.distributed.group import Group
from cogtune.features.index import PictureIndex, Stamp, content_digest, image_content
from cogtune.features.store import Store, make_folder
from cogtune.processing.frames import Frame

_CHUNK = 256


@dataclass(frozen=True)
class Lookup:
    """Results of a lookup.

    ``present``: path -> digest of this process's pictures with features; ``missing``: its other pictures. ``pictures``
    and ``to_compute`` count over all processes; a picture that is not in the index counts as one to compute.
    """

    present: dict[str, str]
    missing: list[ImageRef]
    pictures: int
    to_compute: int


def look_up(images: Collection[ImageRef], store: Store, index: PictureIndex, ranks: Group) -> Lookup:
    """Look up the features of ``images`` and mark those found as used now."""
    mine, pictures = _share(sorted(set(images), key=_place), store.root, ranks)

    def look(some: Sequence[ImageRef]) -> list[str | None]:
        return [_look(image, store, index) for image in some]

    chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
    found = [digest for part in in_threads(look, chunks) for digest in part]
    present = {str(image): digest for image, digest in zip(mine, found, strict=True) if digest is not None}
    missing = [image for image, digest in zip(mine, found, strict=True) if digest is None]
    return Lookup(present, missing, pictures, sum(ranks.gather(len(missing))))


def look_at_contents(before: Lookup, store: Store, index: PictureIndex, ranks: Group) -> Lookup:
    """For a read-only cache: find missing pictures by the bytes of their files too, as filling does."""

    def look(some: Sequence[ImageRef]) -> list[str | None]:
        return [_look_at_content(image, store, index) for image in some]

    missing = before.missing if index.has_contents else []
    chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
    found = [digest for part in in_threads(look, chunks) for digest in part]
    known = {str(image): digest for image, digest in zip(missing, found, strict=True) if digest is not None}
    left = [image for image in before.missing if str(image) not in known]
    return Lookup(before.present | known, left, before.pictures, sum(ranks.gather(len(left))))


def _look_at_content(image: ImageRef, store: Store, index: PictureIndex) -> str | None:
    with suppress(OSError):
        digest = index.find_content(image_content(image, _file_content(file_of(image))))
        if digest is not None and store.has(digest):
            return digest
    return None


def _look(image: ImageRef, store: Store, index: PictureIndex) -> str | None:
    with suppress(OSError):  # reading the picture later reports the error
        digest = index.find(Stamp.of(image))
        if digest is not None and store.has(digest):
            store.touch(digest)
            return digest
    return None


def _share(images: Sequence[ImageRef], root: Path, ranks: Group) -> tuple[list[ImageRef], int]:
    """Return this process's pictures and the total number.

    If all processes see the same cache, each picture is assigned to one process, otherwise to one process per machine.
    """
    if ranks.size == 1:
        return list(images), len(images)
    hosts = ranks.gather(socket.gethostname())
    if len(set(hosts)) == 1 or _is_shared(root, ranks):
        return _part(images, ranks.rank, ranks.size), len(images)
    host = hosts[ranks.rank]
    place = hosts[: ranks.rank].count(host)
    return _part(images, place, hosts.count(host)), len(images) * len(set(hosts))


def _part(images: Sequence[ImageRef], place: int, parts: int) -> list[ImageRef]:
    """Return every ``parts``-th file's images, from that at ``place``: a clip's frames are decoded together."""
    number = {file: count for count, file in enumerate(dict.fromkeys(map(file_of, images)))}
    return [image for image in images if number[file_of(image)] % parts == place]


def _place(image: ImageRef) -> tuple[str, int]:
    return str(file_of(image)), image.index if isinstance(image, Frame) else 0


@lru_cache(maxsize=64)
def _file_content(file: Path) -> str:
    return content_digest(file)


def _is_shared(root: Path, ranks: Group) -> bool:
    """Return whether all ranks see what rank 0 writes."""

    def write() -> Path | None:
        probe = root / f".probe-{uuid.uuid4().hex}"
        with suppress(OSError):
            make_folder(root, root)
            probe.touch()
            return probe
        return None

    probe = ranks.on_main(write)
    if probe is None:  # read-only, so nothing will be computed
        return True
    seen = ranks.gather(probe.exists())
    if ranks.rank == 0:
        probe.unlink(missing_ok=True)
    return all(seen)
