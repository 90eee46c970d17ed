"""Which files in a folder belong to the feature cache. No other file is ever removed or overwritten.

A cache has a mark. A file below it belongs to the cache if both its name and its content say so: features by the name
in their header, a variant's description by the digest that is its folder's name, index and leases by the format of
their lines. A cache of an earlier version has no mark; it is recognised by its files, and then marked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogtune.errors import OutputFolderError
from cogtune.features.file_format import HEADER_BYTES, is_blank, name_in
from cogtune.features.variant import folder_name
from cogtune.language import tr

MARK = "cogtune-cache.json"
ABOUT = "about.json"
SUFFIX = ".safetensors"
INDEX_FOLDER, INDEX_FILE = "index", "pictures.tsv"
CLAIMS_FOLDER, CLAIM_SUFFIX = "leases", ".lease"

_KIND = {"cogtune": "feature cache", "format": 1}
_VARIANT = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"[0-9a-f]{2}")
_FEATURES = re.compile(rf"[0-9a-f]{{40}}{re.escape(SUFFIX)}")
_PARTIAL = re.compile(rf"\.([0-9a-f]{{40}}({re.escape(SUFFIX)})?|about(\.json)?)\..+\.\d+\.\d+\.partial")
_CLAIM = re.compile(rf".+\.\d+\.\d+{re.escape(CLAIM_SUFFIX)}")
_CLAIM_LINE = re.compile(r"\S+/\S+|(by|since|reserve) .*")
_FIELDS = 4
_MOST = 1 << 16  # maximum bytes of a description; longer files are foreign


def mark_text() -> str:
    """Return the content of a cache's mark."""
    about = "Features of pictures, kept by cogtune; `cogtune data cache --clear` empties this folder of them."
    return json.dumps({**_KIND, "about": about}, indent=1) + "\n"


def is_marked(root: Path) -> bool:
    values = _json(root / MARK)
    return values is not None and all(values.get(key) == value for key, value in _KIND.items())


def is_cache(root: Path) -> bool:
    """Return whether ``root`` is a feature cache, by its mark, or without one, by its files."""
    return is_marked(root) or any(True for _ in variants(root)) or is_index(root / INDEX_FOLDER / INDEX_FILE)


def require_cache(root: Path) -> None:
    """Check that ``root`` is a feature cache, before anything is removed.

    Raises:
        OutputFolderError: ``cache-foreign``: there is something, and it is no feature cache.
    """
    try:
        empty = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError:
        empty = False
    if not empty and not is_cache(root):
        raise OutputFolderError(
            tr("{root}: not a feature cache of cogtune; nothing was removed", root=root),
            hint=tr("name the cache with --data.cache_dir, or leave that out for the default one"),
            code="cache-foreign",
        )


def variants(root: Path) -> Iterator[Path]:
    """Return the folders of the cache that hold features."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _VARIANT.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                folder = root / entry.name
                if describe(folder) is not None:
                    yield folder


def describe(folder: Path) -> dict[str, Any] | None:
    """Return the description in a variant's folder, if the folder's name is its digest."""
    values = _json(folder / ABOUT)
    if values is None or not isinstance(values.get("model"), str):
        return None
    decides = {name: value for name, value in values.items() if name != "model"}
    return values if folder_name(decides) == folder.name else None


def feature_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Return the files in a variant's folder that are named like features."""
    for part in _parts(folder):
        with suppress(FileNotFoundError), os.scandir(part) as entries:
            for entry in entries:
                named = _FEATURES.fullmatch(entry.name) and entry.name.startswith(part.name)
                if named and entry.is_file(follow_symlinks=False):
                    yield entry


def leftovers(folder: Path) -> Iterator[Path]:
    """Return unfinished files of writers in a variant's folder."""
    for part in [folder, *_parts(folder)]:
        with suppress(FileNotFoundError), os.scandir(part) as entries:
            yield from [part / entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)]


def label(path: Path) -> str:
    """Return ``variant/digest`` of a feature file: its name in leases and in its own header."""
    return f"{path.parent.parent.name}/{path.name.removesuffix(SUFFIX)}"


def is_features(path: Path) -> bool:
    """Return whether a file holds features, by its header, or is blank (after a power failure)."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError:
        return False
    return is_blank(head) or name_in(head) is not None


def is_index(path: Path) -> bool:
    """Return whether a file is a picture index: it has a valid line."""
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return any(index_fields(line) is not None for line in file)
    except OSError:
        return False


def may_be_index(path: Path) -> bool:
    """Return whether a file is an index, is blank or does not exist."""
    with suppress(FileNotFoundError):
        return path.stat().st_size == 0 or is_index(path)
    return True


def index_fields(line: str) -> list[str] | None:
    """Return scope, stamp, content and pixels of a line of the index, or None if its checksum is wrong."""
    body, _, check = line.rstrip("\n").rpartition("\t")
    fields = body.split("\t")
    return fields if len(fields) == _FIELDS and check == checksum(body.encode("ascii", "replace")) else None


def checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def is_claim(path: Path) -> bool:
    """Return whether a file is a lease of a run."""
    if not _CLAIM.fullmatch(path.name) or not path.is_file():
        return False
    with suppress(OSError):
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        return all(_CLAIM_LINE.fullmatch(line) for line in lines)
    return False


def _parts(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [
            folder / entry.name
            for entry in entries
            if _PART.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    return []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
