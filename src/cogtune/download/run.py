"""A repository of a hub into a folder: listed, space checked, fetched file by file, and checked as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cogtune.checkpoint.load import check_folder
from cogtune.download.http import Client
from cogtune.download.remote import RemoteFile, list_files
from cogtune.download.sources import HF_ENDPOINT, MODELSCOPE_ENDPOINT, Repository, Source
from cogtune.download.transfer import PART, fetch
from cogtune.errors import InputError

_SPARE = 1 << 30
_SKIPPED = (".gitattributes",)


@dataclass(frozen=True)
class Downloaded:
    """``fetched`` and ``present`` count files; ``size`` is that of the whole repository in bytes."""

    folder: Path
    fetched: int
    present: int
    size: int


def endpoint_of(source: Source) -> str:
    """The hub's address: HF_ENDPOINT (a mirror) for hf, MODELSCOPE_ENDPOINT for modelscope, or the public ones."""
    if source == "hf":
        return os.environ.get("HF_ENDPOINT", HF_ENDPOINT).rstrip("/")
    return os.environ.get("MODELSCOPE_ENDPOINT", MODELSCOPE_ENDPOINT).rstrip("/")


def download(
    repository: Repository,
    folder: Path,
    source: Source,
    *,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
    pause: Callable[[float], None] | None = None,
) -> Downloaded:
    """Fetch what is missing of ``repository`` into ``folder``; ``progress(path, done, total)`` counts all files' bytes.

    Raises:
        InputError: offline by HF_HUB_OFFLINE, no such repository, or too little space for what is missing.
        DownloadError: the hub stays silent, or a file arrived wrong.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise InputError(
            "HF_HUB_OFFLINE is set, so nothing is fetched",
            hint=f"unset HF_HUB_OFFLINE; or copy the folder from another machine to {folder}",
            code="download-offline",
        )
    endpoint = endpoint_of(source)
    client = Client(os.environ.get("HF_TOKEN") if source == "hf" else None)
    files = [f for f in list_files(client, source, endpoint, repository) if f.path not in _SKIPPED]
    missing = [file for file in files if not _is_there(folder / file.path, file)]
    size, left = sum(file.size for file in files), _left(folder, missing)
    say(f"{repository.name} from {endpoint}: {len(files)} files, {size / 1e9:.2f} GB; {left / 1e9:.2f} GB to fetch")
    _require_space(folder, left)
    done = size - sum(file.size for file in missing)
    for file in missing:

        def advance(count: int, path: str = file.path) -> None:
            nonlocal done
            done += count
            progress(path, done, size)

        extra = {} if pause is None else {"pause": pause}
        fetch(client, file, folder / file.path, advance, **extra)
    if repository.kind == "model":
        check_folder(folder)
    return Downloaded(folder, len(missing), len(files) - len(missing), size)


def _is_there(path: Path, file: RemoteFile) -> bool:
    """A file of the right size counts as fetched: ours get their name after the check, hand-copied ones are trusted."""
    return path.is_file() and path.stat().st_size == file.size


def _left(folder: Path, missing: list[RemoteFile]) -> int:
    begun = [folder / (file.path + PART) for file in missing]
    return sum(file.size for file in missing) - sum(part.stat().st_size for part in begun if part.is_file())


def _require_space(folder: Path, needed: int) -> None:
    there = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed + _SPARE > free:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are to be fetched, and 1 GB should stay free",
            hint="free some space, or name a folder on another disk with --output",
            code="download-space",
        )
