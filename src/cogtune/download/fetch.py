"""Download a hub repository into a folder: list it, check the disk space, fetch each file, and check the whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cogtune.checkpoint.model_files import check_folder
from cogtune.download.http import Client
from cogtune.download.remote import PART, RemoteFile, list_files
from cogtune.download.sources import HF_ENDPOINT, MODELSCOPE_ENDPOINT, Repository, Source
from cogtune.download.transfer import fetch
from cogtune.errors import InputError, OutputFolderError
from cogtune.language import phrase, tr
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.hub_cache import cached_file, hub_cache
from cogtune.system.locks import Lock, lock_folder

_SPARE = 1 << 30
_CONTINUES = phrase("then run the same command again: it continues")
_SKIPPED = (".gitattributes",)


@dataclass(frozen=True)
class Downloaded:
    """Counts of files: ``fetched``, ``present``, and ``cached`` (taken from the hub's own cache). ``size``: bytes of
    the whole repository.
    """

    folder: Path
    fetched: int
    present: int
    cached: int
    size: int


def endpoint_of(source: Source) -> str:
    """Return the hub's address: HF_ENDPOINT (a mirror) for hf, MODELSCOPE_ENDPOINT for modelscope, or the
    public one.
    """
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
    timeout: float = Client.timeout,
) -> Downloaded:
    """Download the files of ``repository`` that ``folder`` lacks. ``progress(path, done, total)`` counts bytes of all
    files.

    Files in the Hugging Face hub's own cache are hard-linked, or copied from another disk. A connection without data
    for ``timeout`` seconds is reopened.

    Raises:
        InputError: HF_HUB_OFFLINE is set, no such repository, or too little disk space.
        DownloadError: the hub does not respond, or a file arrived damaged.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise InputError(
            tr("HF_HUB_OFFLINE is set, so nothing is fetched"),
            hint=tr("unset HF_HUB_OFFLINE; or copy the folder from another machine to {folder}", folder=folder),
            code="download-offline",
        )
    instead = tr("name another folder with --output")
    with lock_folder(folder, instead, say) as lock, explained(folder, then=tr(_CONTINUES)):
        return _download(repository, folder, source, say, progress, pause, timeout, lock)


def _download(
    repository: Repository,
    folder: Path,
    source: Source,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
    pause: Callable[[float], None] | None,
    timeout: float,
    lock: Lock,
) -> Downloaded:
    endpoint = endpoint_of(source)
    client = Client(os.environ.get("HF_TOKEN") if source == "hf" else None, timeout)
    listed = _listed(client, source, endpoint, repository)
    missing = [file for file in listed if not _is_there(folder / file.path, file)]
    _require_free(folder, missing)
    present, cached = len(listed) - len(missing), _cached(repository, missing)
    _link(cached, folder)
    missing = [file for file in missing if not _is_there(folder / file.path, file)]
    size, left = sum(file.size for file in listed), _left(folder, missing)
    say(
        tr(
            "{name} from {endpoint}: {listed} files, {size:.2f} GB; {left:.2f} GB to fetch",
            name=repository.name,
            endpoint=endpoint,
            listed=len(listed),
            size=size / 1e9,
            left=left / 1e9,
        )
    )
    if cached:
        say(
            tr(
                "{cached} of them are in the hub's own cache, {hub_cache}, and are taken from there",
                cached=len(cached),
                hub_cache=hub_cache(),
            )
        )
    _require_space(folder, left)
    done = size - sum(file.size for file in missing)
    for file in missing:

        def advance(count: int, path: str = file.path) -> None:
            nonlocal done
            done += count
            progress(path, done, size)

        lock.require()
        extra = {} if pause is None else {"pause": pause}
        if file.path in cached:
            _copy(cached[file.path], folder / file.path)
            advance(file.size)
        else:
            fetch(client, file, folder / file.path, advance, **extra)
    if repository.kind == "model":
        check_folder(folder)
    return Downloaded(folder, len(listed) - present - len(cached), present, len(cached), size)


def _listed(client: Client, source: Source, endpoint: str, repository: Repository) -> list[RemoteFile]:
    """Return the files of the repository, and those of the one beside it that it does not have itself."""
    found = [f for f in list_files(client, source, endpoint, repository) if f.path not in _SKIPPED]
    if repository.only:
        found = [file for file in found if file.path in repository.only]
    if repository.beside is None:
        return found
    there = {file.path for file in found}
    return found + [f for f in _listed(client, source, endpoint, repository.beside) if f.path not in there]


def _cached(repository: Repository, missing: list[RemoteFile]) -> dict[str, Path]:
    """Return the missing files that are in the hub's own cache, by their path in the repository."""
    found = {}
    for file in missing:
        if file.sha256 is not None:
            names = repository.hf if repository.beside is None else (*repository.hf, *repository.beside.hf)
            blob = cached_file(repository.kind, names, file.sha256, file.size)
            if blob is not None:
                found[file.path] = blob
    return found


def _link(cached: dict[str, Path], folder: Path) -> None:
    """Hard-link these files into ``folder``, if they are on the same disk."""
    for path, blob in cached.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(target.name + PART).unlink(missing_ok=True)
        with suppress(OSError):  # another disk, or one without hard links: it is copied later
            os.link(blob, target)


def _copy(blob: Path, target: Path) -> None:
    files.clear_leftovers(target, locked=True)
    with files.growing(target) as copy:
        shutil.copyfile(blob, copy)


def _is_there(path: Path, file: RemoteFile) -> bool:
    """Return whether a file of the right size exists.

    It counts as downloaded: ours are renamed only after the check, and files copied by hand are trusted.
    """
    return path.is_file() and path.stat().st_size == file.size


def _require_free(folder: Path, missing: list[RemoteFile]) -> None:
    """Raises OutputFolderError where a file would be replaced: ours have the right size, so it is somebody else's."""
    for file in missing:
        target = folder / file.path
        if os.path.lexists(target):
            found = tr("{st_size:,} bytes", st_size=target.stat().st_size) if target.is_file() else tr("no file")
            raise OutputFolderError(
                tr(
                    "{target}: there is something else ({found}; the hub's file has {size:,} bytes), and"
                    " nothing is overwritten",
                    target=target,
                    found=found,
                    size=file.size,
                ),
                hint=tr("remove it or move it away, or name another folder with --output; then run the command again"),
                code="download-conflict",
            )


def _left(folder: Path, missing: list[RemoteFile]) -> int:
    begun = [folder / (file.path + PART) for file in missing]
    return sum(file.size for file in missing) - sum(part.stat().st_size for part in begun if part.is_file())


def _require_space(folder: Path, needed: int) -> None:
    there = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed + _SPARE > free:
        raise InputError(
            tr(
                "{folder}: {free:.1f} GB free; {needed:.1f} GB are to be fetched, and 1 GB should stay free",
                folder=folder,
                free=free / 1e9,
                needed=needed / 1e9,
            ),
            hint=tr("free some space, or name a folder on another disk with --output"),
            code="download-space",
        )
