"""Paths in the Hugging Face hub's own cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def hub_cache() -> Path:
    """Return the cache folder: HF_HUB_CACHE, or ``hub`` under HF_HOME."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cached_file(kind: str, names: Iterable[str], sha256: str, size: int) -> Path | None:
    """Return the cached file with this digest from a repository with one of these names, if it is complete.

    ``kind``: model or dataset. The cache stores large files under their digest.
    """
    for name in names:
        blob = hub_cache() / f"{kind}s--{name.replace('/', '--')}" / "blobs" / sha256
        if blob.is_file() and blob.stat().st_size == size:
            return blob.resolve()
    return None
