"""Files and folders of the feature cache, shared by ranks, runs and users.

    CACHE/cogtune-cache.json                       the mark: this folder is a cache (`features.ownership`)
    CACHE/<variant>/about.json                     what the variant is
    CACHE/<variant>/ab/abcdef....safetensors       one picture; the name is the digest of its pixels
    CACHE/index/pictures.tsv                       which picture files hold which pixels (`features.index`)
    CACHE/leases/...                               what running runs need (`features.lease`)

Files are written atomically: under a unique hidden name, then renamed. Two processes may write the same file. New
folders and files take the permissions of the cache's folder: to share the cache with a group, make that folder
group-writable and setgid.
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
from cogtune.language import phrase, tr
from cogtune.system import files, flock
from cogtune.system.locks import FOLDER_LOCK

_REPAIR = phrase("run the same command again: it fills what is missing and continues from the last checkpoint")


class FeatureCacheError(RunError):
    """The feature cache lost a file that the run needs, or cannot store it."""

    default_code = "cache"


def default_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/cogtune/features``, or the folder below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogtune" / "features"


class Store:
    """The feature files of one variant."""

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
        """Return `path` as text, which is faster: a run asks for every picture's path when it starts."""
        return f"{self._prefix}{digest[:2]}{os.sep}{digest}{SUFFIX}"

    def has(self, digest: str) -> bool:
        """Return whether the picture's file exists with the right size; its content is checked when it is read."""
        try:
            return os.stat(self._place(digest)).st_size == self._file_bytes
        except OSError:
            return False

    def write(self, digest: str, features_QW: torch.Tensor) -> None:
        """Store features [Q, W] (CPU). Raises OSError from the system; no partial file remains.

        Raises:
            FeatureCacheError: ``cache-foreign``: another file has this name.
        """
        path = self.path(digest)
        if path.exists() and not is_features(path):
            raise foreign(path)
        make_folder(path.parent, self.root)
        write_atomically(path, pack(features_QW, self.layout, self._label(digest)), self.root)

    def read(self, digest: str) -> torch.Tensor:
        """Return features [Q, W] in the stored dtype; float32 for float8.

        Raises:
            FeatureCacheError: ``cache-missing``, or ``cache-damaged``: the file is then removed, so that the next fill
                computes it again.
        """
        path = self.path(digest)
        try:
            return unpack(_read(path), self.layout, self._label(digest))
        except FileNotFoundError as error:
            raise FeatureCacheError(
                tr("{path}: this picture's features are missing from the feature cache", path=path),
                hint=tr(_REPAIR),
                code="cache-missing",
            ) from error
        except DamagedError as error:
            removed = self.remove(digest)
            what = tr("the file was removed") if removed else tr("it cannot be removed, or the cache did not write it")
            raise FeatureCacheError(
                tr("{path}: a damaged file in the feature cache ({error}); {what}", path=path, error=error, what=what),
                hint=tr(_REPAIR) if removed else tr("remove the file, then {repair}", repair=tr(_REPAIR)),
                code="cache-damaged",
            ) from error

    def remove(self, digest: str) -> bool:
        """Remove a file; return whether it is gone. Foreign files are kept."""
        path = self.path(digest)
        with suppress(OSError):
            if is_features(path):
                path.unlink(missing_ok=True)
        return not path.exists()

    def touch(self, digest: str) -> None:
        """Mark the file as used now; the least recently used files are evicted first. Does nothing in a read-only
        cache."""
        with suppress(OSError):
            os.utime(self._place(digest))

    def prepare(self, model: str) -> None:
        """Mark the cache, create and describe the variant's folder, and remove unfinished files of killed writers.

        Raises:
            FeatureCacheError: ``cache-foreign``: other files have these names.
            OSError: from the system.
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
    """Mark ``root`` as a cache. Raises OSError, and FeatureCacheError if another file has the mark's name."""
    if not is_marked(root):
        _write_own(root / MARK, mark_text(), root)


def _write_own(path: Path, text: str, root: Path) -> None:
    """Write a description if the file is missing or blank."""
    if path.exists() and not (path.is_file() and is_blank(path.read_bytes())):
        raise foreign(path)
    write_atomically(path, text.encode(), root)


def foreign(path: Path) -> FeatureCacheError:
    """Return the error for a foreign file with the name of one of the cache's own."""
    return FeatureCacheError(
        tr("{path}: the feature cache needs this name for a file of its own, and did not write this one", path=path),
        hint=tr("move it away, or choose another folder with data.cache_dir"),
        code="cache-foreign",
    )


@contextmanager
def turn(root: Path) -> Iterator[None]:
    """Lock out other processes that measure, evict from or clear the cache."""
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666 if root.is_dir() else 0o666
    with flock.turn(root / FOLDER_LOCK, mode):
        yield


def make_folder(folder: Path, root: Path) -> None:
    """Create ``folder`` (at or below ``root``) and its parents, with ``root``'s permissions."""
    missing = [path for path in (folder, *folder.parents) if path.is_relative_to(root) and not path.exists()]
    for path in reversed(missing):
        path.mkdir(parents=True, exist_ok=True)
        if path != root:
            with suppress(PermissionError):  # another user created it at the same time
                path.chmod(stat.S_IMODE(root.stat().st_mode))


def write_atomically(path: Path, content: bytes, root: Path) -> None:
    """Write a file atomically, with the read and write permissions of ``root``.

    It is not flushed to disk: a kill cannot truncate it, and damage by a power failure is detected by size and digest.
    """
    files.write_bytes(path, content, mode=stat.S_IMODE(root.stat().st_mode) & 0o666)


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache: size in bytes, and time of last use (seconds since 1970)."""

    path: Path
    size: int
    used: float


def scan(root: Path) -> list[CachedFile]:
    """Return every feature file of the cache."""
    found = []
    for folder in variants(root):
        for entry in feature_files(folder):
            with suppress(FileNotFoundError):  # another process removed it meanwhile
                status = entry.stat(follow_symlinks=False)
                found.append(CachedFile(Path(entry.path), status.st_size, status.st_mtime))
    return found


def _read(path: Path) -> bytearray:
    with path.open("rb") as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        length = file.readinto(content)
    return content[:length]
