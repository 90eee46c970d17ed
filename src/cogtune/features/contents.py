"""Statistics of the feature cache, and clearing it."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.features import lease
from cogtune.features.budget import measure
from cogtune.features.choose import size_text
from cogtune.features.ownership import (
    ABOUT,
    CLAIMS_FOLDER,
    INDEX_FILE,
    INDEX_FOLDER,
    MARK,
    describe,
    feature_files,
    is_features,
    is_marked,
    label,
    leftovers,
    may_be_index,
    require_cache,
    variants,
)
from cogtune.features.store import turn
from cogtune.language import tr
from cogtune.system import files


def stat(root: Path, budget: str) -> dict[str, Any]:
    """Return counts and bytes of the cache and of each variant, as plain values for JSON."""
    space = measure(root, budget, ())
    held = lease.leased(root)
    return {
        "folder": str(root),
        "bytes": space.taken,
        "budget_bytes": space.budget,
        "free_bytes": space.free,
        "evictable_bytes": space.evictable,
        "reserved_bytes": space.reserved,
        "variants": [_variant(folder, held) for folder in variants(root)],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the same as text for the console."""
    text = [
        tr(
            "{folder}: {size}; budget {budget}, {free} free on its disk",
            folder=found["folder"],
            size=size_text(found["bytes"]),
            budget=size_text(found["budget_bytes"]),
            free=size_text(found["free_bytes"]),
        )
    ]
    for one in found["variants"]:
        used = tr("never used") if one["last_used"] is None else tr("last used {last_used}", last_used=one["last_used"])
        busy = tr(", {in_use} in use", in_use=one["in_use"]) if one["in_use"] else ""
        text.append(
            tr(
                "  {pictures} pictures, {size}, {stored} by {compute}, of the tower {tower} in {model} ({used}{busy})",
                pictures=one["pictures"],
                size=size_text(one["bytes"]),
                stored=one["stored"],
                compute=one["compute"],
                tower=one["tower"][:12],
                model=one["model"],
                used=used,
                busy=busy,
            )
        )
    return text


@dataclass(frozen=True)
class Cleared:
    """Results of `clear`.

    ``removed`` features and their ``size`` in bytes; ``kept``: features that running runs need; ``others``: foreign
    files in the cache's folders, which are kept.
    """

    removed: int = 0
    size: int = 0
    kept: int = 0
    others: int = 0


def clear(root: Path) -> Cleared:
    """Remove all features that no running run needs, and if none are left, the cache's index and mark.

    Raises:
        OutputFolderError: ``root`` is no feature cache; nothing was removed.
    """
    require_cache(root)
    if not root.is_dir():
        return Cleared()
    with turn(root):
        held = lease.leased(root)
        parts = [_clear_variant(folder, held) for folder in variants(root)]
        kept = sum(part.kept for part in parts)
        if not kept and not held.since:
            _clear_rest(root)
    return Cleared(
        sum(part.removed for part in parts), sum(part.size for part in parts), kept, sum(part.others for part in parts)
    )


def _clear_variant(folder: Path, held: lease.Held) -> Cleared:
    removed = size = kept = 0
    for entry in list(feature_files(folder)):
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            path = Path(entry.path)
            if held.holds(label(path), status.st_mtime):
                kept += 1
            elif is_features(path):
                path.unlink()
                removed, size = removed + 1, size + status.st_size
    if kept or folder.name in held.since:
        return Cleared(removed, size, kept)
    for leftover in leftovers(folder):
        if files.is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
    for part in folder.iterdir():
        _remove_empty(part)
    others = sum(path.name != ABOUT and not path.is_dir() for path in folder.rglob("*"))
    if not others:
        (folder / ABOUT).unlink()
        _remove_empty(folder)
    return Cleared(removed, size, 0, others)


def _clear_rest(root: Path) -> None:
    """Remove the index, remaining leases and the mark: only recognised files, and only empty folders."""
    index = root / INDEX_FOLDER / INDEX_FILE
    if may_be_index(index):
        index.unlink(missing_ok=True)
    for name in (INDEX_FOLDER, CLAIMS_FOLDER):
        _remove_empty(root / name)
    if is_marked(root) and not any(True for _ in variants(root)):
        (root / MARK).unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or not a folder
        folder.rmdir()


def _variant(folder: Path, held: lease.Held) -> dict[str, Any]:
    about = describe(folder) or {}
    count = size = in_use = 0
    used = 0.0
    for entry in feature_files(folder):
        with suppress(FileNotFoundError):
            status = entry.stat()
            count, size, used = count + 1, size + status.st_size, max(used, status.st_mtime)
            in_use += held.holds(label(Path(entry.path)), status.st_mtime)
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime(used)) if count else None
    names = ("model", "tower", "compute", "stored")
    described = {name: about.get(name, "?") for name in names}
    return {"name": folder.name, "pictures": count, "bytes": size, "last_used": last, "in_use": in_use, **described}
