"""What the feature cache holds, and emptying it."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogtune.features import index, lease
from cogtune.features.budget import measure
from cogtune.features.choose import size_text
from cogtune.features.store import ABOUT, feature_files, variants


def stat(root: Path, budget: str) -> dict[str, Any]:
    """Counts and bytes of the cache and of each variant in it, as plain values for JSON."""
    space = measure(root, budget, ())
    held = lease.leased(root)
    return {
        "folder": str(root),
        "bytes": space.taken,
        "budget_bytes": space.budget,
        "free_bytes": space.free,
        "evictable_bytes": space.evictable,
        "variants": [_variant(folder, held) for folder in variants(root)],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    text = [
        f"{found['folder']}: {size_text(found['bytes'])}; budget {size_text(found['budget_bytes'])}, "
        f"{size_text(found['free_bytes'])} free on its disk"
    ]
    for one in found["variants"]:
        used = "never used" if one["last_used"] is None else f"last used {one['last_used']}"
        busy = f", {one['in_use']} in use" if one["in_use"] else ""
        text.append(
            f"  {one['pictures']} pictures, {size_text(one['bytes'])}, {one['stored']} by {one['compute']}, "
            f"of the tower {one['tower'][:12]} in {one['model']} ({used}{busy})"
        )
    return text


def clear(root: Path) -> tuple[int, int, int]:
    """Remove all features but those that running runs need, and the index if nothing is left.

    Returns how many files and bytes were removed, and how many files were kept.
    """
    held = lease.leased(root)
    count = size = kept = 0
    for folder in variants(root):
        left = 0
        for entry in list(feature_files(folder)):
            if f"{folder.name}/{Path(entry.name).stem}" in held:
                left += 1
                continue
            with suppress(FileNotFoundError):
                size += entry.stat().st_size
                Path(entry.path).unlink()
                count += 1
        kept += left
        if not left:
            shutil.rmtree(folder)
    if not kept:
        for name in (index.FOLDER, lease.FOLDER):
            shutil.rmtree(root / name, ignore_errors=True)
    return count, size, kept


def _variant(folder: Path, held: set[str]) -> dict[str, Any]:
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    count = size = in_use = 0
    used = 0.0
    for entry in feature_files(folder):
        with suppress(FileNotFoundError):
            status = entry.stat()
            count, size, used = count + 1, size + status.st_size, max(used, status.st_mtime)
            in_use += f"{folder.name}/{Path(entry.name).stem}" in held
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime(used)) if count else None
    names = ("model", "tower", "compute", "stored")
    described = {name: about[name] for name in names}
    return {"name": folder.name, "pictures": count, "bytes": size, "last_used": last, "in_use": in_use, **described}
