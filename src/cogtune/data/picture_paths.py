"""Locate the pictures of a records file: below the allowed roots, or extracted from the file itself."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.data.formats.item import Embedded, PictureSource
from cogtune.data.problems import BadRecordError
from cogtune.errors import DiskFullError, OutputFolderError
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.file_errors import is_disk_full

_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
_NAME = 32


def default_extract_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/cogtune/pictures``, or that folder below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogtune" / "pictures"


@dataclass(frozen=True)
class Root:
    """A folder that picture paths may lie in, as written and with symbolic links resolved."""

    path: Path
    absolute: str
    real: str

    @staticmethod
    def of(path: Path) -> Root:
        return Root(path, os.path.abspath(path), os.path.realpath(path))

    def relative(self, target: str) -> str | None:
        """Return the path of ``target`` (absolute, normalised) below this root, or None.

        A linked root counts as its target.
        """
        for base in (self.absolute, self.real):
            if target == base or target.startswith(base.rstrip(os.sep) + os.sep):
                return os.path.relpath(target, base)
        return None


@dataclass(frozen=True)
class Located:
    """A picture's file, and its name in keys: relative to its root, or the digest of its bytes."""

    path: Path
    name: str


@dataclass
class Places:
    """Finds the pictures that the records of ``data.path`` name.

    Attributes:
        image_roots: ``data.image_root``; empty: the folder of each file of records.
        extract_dir: where embedded pictures go.
    """

    image_roots: tuple[Path, ...]
    extract_dir: Path
    used: bool = False
    _roots: dict[Path, Root] = field(default_factory=dict)
    _written: set[str] = field(default_factory=set)

    def locate(self, image: PictureSource, folder: Path) -> Located:
        """Return the file of ``image``, which a file in ``folder`` names; it need not exist.

        Raises:
            BadRecordError: ``image-outside``, a path that leaves every root; ``image-empty``.
            OutputFolderError, DiskFullError: an embedded picture cannot be written.
        """
        if isinstance(image, Embedded):
            return self._extract(image.data)
        roots = [self._root(root) for root in self.image_roots or (folder,)]
        self.used = True
        names = (image,) if isinstance(image, str) else image
        found = [
            Located(located.path, self._prefix(root) + located.name)
            for root in roots
            for name in names
            if (located := _below(root, name)) is not None
        ]
        if not found:
            named = ", ".join(str(root.path) for root in roots)
            raise BadRecordError(
                "image-outside",
                tr("the picture {shown_path} is outside of {named}", shown_path=shown_path(names[0]), named=named),
            )
        if len(found) == 1:
            return found[0]
        return next((located for located in found if _exists(located.path)), found[0])

    def _prefix(self, root: Root) -> str:
        """Return what distinguishes equal paths below several roots in keys."""
        if len(self.image_roots) < 2:
            return ""
        name = Path(root.absolute).name
        alike = [other for other in self.image_roots if Path(os.path.abspath(other.expanduser())).name == name]
        return f"{name}/" if len(alike) == 1 else f"{root.absolute}/"

    def _root(self, path: Path) -> Root:
        if path not in self._roots:
            self._roots[path] = Root.of(path.expanduser())
        return self._roots[path]

    def _extract(self, data: bytes) -> Located:
        if not data:
            raise BadRecordError("image-empty", tr("the picture inside the record is empty (0 bytes)"))
        digest = hashlib.sha256(data).hexdigest()[:_NAME]
        suffix = next((suffix for mark, suffix in _SUFFIXES.items() if data.startswith(mark)), ".img")
        path = self.extract_dir / digest[:2] / f"{digest}{suffix}"
        if digest not in self._written and not (path.is_file() and path.stat().st_size == len(data)):
            _write(path, data)
        self._written.add(digest)
        return Located(path, digest)


def shown_path(path: Path | str) -> str:
    """Return ``path`` for a message, with names over 80 characters cut."""
    return re.sub(r"([^/]{77})[^/]{4,}", r"\1...", str(path))


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # told when the picture is looked at
        return False


def _below(root: Root, name: str) -> Located | None:
    target = os.path.normpath(os.path.join(root.real, name))
    relative = root.relative(target)
    if relative is None and os.path.isabs(name):
        relative = root.relative(os.path.realpath(name))
    if relative is None:
        return None
    return Located(root.path.expanduser() / relative, Path(relative).as_posix())


def _write(path: Path, data: bytes) -> None:
    """Write the file completely or not at all, even if several processes write the same picture."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(
                tr("{parent}: no space for the pictures that come inside the data", parent=path.parent)
            ) from error
        raise OutputFolderError(
            tr(
                "{parent}: the pictures that come inside the data cannot be written there ({error})",
                parent=path.parent,
                error=error,
            ),
            hint=tr("name another folder with data.extract_dir"),
            code="extract-dir",
        ) from error
