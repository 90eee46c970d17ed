"""Files and folders of the feature cache, shared by ranks, runs and users.

    CACHE/cogtune-cache.json                       the mark: this folder is a cache (`features.ownership`)
    CACHE/<variant>/about.json                     what the variant is
    CACHE/<variant>/ab/abcdef....safetensors       one picture; the name is the digest of its pixels
    CACHE/index/pictures.tsv                       which picture files hold which pixels (`features.index`)
    CACHE/leases/...                               what runs that are going on need (`features.lease`)

A file is written under a hidden name of its own and renamed, so it is whole or absent, and two processes that write the
same one do no harm. New folders and files take the permissions of the cache's folder: make that one writable for a
group (and setgid), and the whole cache is the group's.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cogtune.errors import RunError
from cogtune.features.file_format import DamagedError, is_blank, pack, unpack
from cogtune.features.ownership import (
    ABOUT,
    MARK,
    SUFFIX,
    describe,
    feature_files,
    is_features,
    is_marked,
    leftovers,
    mark_text,
    variants,
)
from cogtune.features.variant import FeatureVariant
from cogtune.system import files, locks

_REPAIR = "run the same command again: it fills what is missing and continues from the last checkpoint"


class FeatureCacheError(RunError):
    """The feature cache lost or cannot take a file that the run needs."""

    default_code = "cache"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/cogtune/features``, or below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogtune" / "features"


class Store:
    """The files of one variant."""

    def __init__(self, root: Path, variant: FeatureVariant) -> None:
        self.root = root
        self.variant = variant
        self.layout = variant.layout
        self.folder = root / variant.name
        self._prefix = f"{self.folder}{os.sep}"
        self._file_bytes = self.layout.file_bytes

    def path(self, digest: str) -> Path:
        return Path(self._place(digest))

    def _place(self, digest: str) -> str:
        """`path` as text: a run asks for every picture's when it starts."""
        return f"{self._prefix}{digest[:2]}{os.sep}{digest}{SUFFIX}"

    def has(self, digest: str) -> bool:
        """Whether the picture's file is there and of the right size; its content is checked when it is read."""
        try:
            return os.stat(self._place(digest)).st_size == self._file_bytes
        except OSError:
            return False

    def write(self, digest: str, features_QW: torch.Tensor) -> None:
        """Store features [Q, W] (CPU). OSError as the system raises it; nothing is left behind then.

        Raises:
            FeatureCacheError: ``cache-foreign``: another file has this name.
        """
        path = self.path(digest)
        if path.exists() and not is_features(path):
            raise foreign(path)
        make_folder(path.parent, self.root)
        write_atomically(path, pack(features_QW, self.layout, self._label(digest)), self.root)

    def read(self, digest: str) -> torch.Tensor:
        """Features [Q, W] in the stored format; float32 where that is float8.

        Raises:
            FeatureCacheError: ``cache-missing``, or ``cache-damaged``: the file is then removed, so that the next
                filling makes it anew.
        """
        path = self.path(digest)
        try:
            return unpack(_read(path), self.layout, self._label(digest))
        except FileNotFoundError as error:
            raise FeatureCacheError(
                f"{path}: this picture's features are gone from the feature cache", hint=_REPAIR, code="cache-missing"
            ) from error
        except DamagedError as error:
            removed = self.remove(digest)
            what = "the file was removed" if removed else "it cannot be removed, or is none of the cache's own"
            raise FeatureCacheError(
                f"{path}: a damaged file in the feature cache ({error}); {what}",
                hint=_REPAIR if removed else f"remove the file, then {_REPAIR}",
                code="cache-damaged",
            ) from error

    def remove(self, digest: str) -> bool:
        """Whether the file is gone afterwards; one that is none of the cache's own stays."""
        path = self.path(digest)
        with suppress(OSError):
            if is_features(path):
                path.unlink(missing_ok=True)
        return not path.exists()

    def touch(self, digest: str) -> None:
        """Note that the file was used now: what was not used longest is evicted first. A read-only cache keeps none."""
        with suppress(OSError):
            os.utime(self._place(digest))

    def prepare(self, model: str) -> None:
        """Mark the cache, make the variant's folder and describe it; remove what killed writers left behind. OSError as
        it comes.

        Raises:
            FeatureCacheError: ``cache-foreign``: other files have these names.
        """
        make_folder(self.folder, self.root)
        mark(self.root)
        if describe(self.folder) is None:
            text = json.dumps({**asdict(self.variant), "model": model}, indent=1) + "\n"
            _write_own(self.folder / ABOUT, text, self.root)
        for leftover in leftovers(self.folder):
            if files.is_abandoned(leftover):
                leftover.unlink(missing_ok=True)

    def _label(self, digest: str) -> str:
        return f"{self.variant.name}/{digest}"


def mark(root: Path) -> None:
    """Mark ``root`` as a cache. OSError as it comes; FeatureCacheError: another file has the mark's name."""
    if not is_marked(root):
        _write_own(root / MARK, mark_text(), root)


def _write_own(path: Path, text: str, root: Path) -> None:
    """Write a description where there is none, or nothing in it."""
    if path.exists() and not (path.is_file() and is_blank(path.read_bytes())):
        raise foreign(path)
    write_atomically(path, text.encode(), root)


def foreign(path: Path) -> FeatureCacheError:
    """The error for a file that stands where one of the cache's own belongs."""
    return FeatureCacheError(
        f"{path}: in the way: the feature cache keeps a file of its own under this name, and this is none",
        hint="move it away, or choose another folder with data.cache_dir",
        code="cache-foreign",
    )


@contextmanager
def turn(root: Path) -> Iterator[None]:
    """A moment in which no other process measures, evicts from or clears the cache."""
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666 if root.is_dir() else 0o666
    with locks.turn(root / locks.FOLDER_LOCK, mode):
        yield


def make_folder(folder: Path, root: Path) -> None:
    """Make ``folder`` (at or below ``root``) and its parents, with ``root``'s permissions."""
    missing = [path for path in (folder, *folder.parents) if path.is_relative_to(root) and not path.exists()]
    for path in reversed(missing):
        path.mkdir(parents=True, exist_ok=True)
        if path != root:
            with suppress(PermissionError):  # another user made it at the same moment
                path.chmod(stat.S_IMODE(root.stat().st_mode))


def write_atomically(path: Path, content: bytes, root: Path) -> None:
    """Write a file that is whole or absent, with the read and write permissions of ``root``.

    It is not flushed to disk: a kill cannot tear it, and what a power failure tears is noticed by size and digest.
    """
    files.write_bytes(path, content, mode=stat.S_IMODE(root.stat().st_mode) & 0o666)


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache: bytes, and when it was last used (seconds since 1970)."""

    path: Path
    size: int
    used: float


def scan(root: Path) -> list[CachedFile]:
    """Every feature file of the cache."""
    found = []
    for folder in variants(root):
        for entry in feature_files(folder):
            with suppress(FileNotFoundError):  # removed by another process meanwhile
                status = entry.stat(follow_symlinks=False)
                found.append(CachedFile(Path(entry.path), status.st_size, status.st_mtime))
    return found


def _read(path: Path) -> bytearray:
    with path.open("rb") as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        length = file.readinto(content)
    return content[:length]
