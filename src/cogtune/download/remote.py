"""List a hub repository: every file with its size and digest, through the hubs' HTTP interfaces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from cogtune.download.http import BROKEN, Client
from cogtune.download.sources import Repository, Source
from cogtune.errors import DownloadError, InputError
from cogtune.language import tr
from cogtune.system.names import name_problem

PART = ".part"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file: its path in the repository, size in bytes, sha256 if the hub has it, and URL."""

    path: str
    size: int
    sha256: str | None
    url: str


def list_files(client: Client, source: Source, endpoint: str, repository: Repository) -> list[RemoteFile]:
    """List the files of the first of the repository's names that the hub knows.

    Raises:
        DownloadError: the hub does not respond, or knows none of the names.
    """
    tried = []
    for name in repository.names(source):
        found = _try(client, source, endpoint, repository.kind, name)
        if found is not None:
            _require_distinct(found, endpoint)
            return found
        tried.append(name)
    raise InputError(
        tr("{endpoint}: no repository {tried} can be read there", endpoint=endpoint, tried=" or ".join(tried)),
        hint=tr("is it gated? Accept its licence on its page and set HF_TOKEN; or use the other --source"),
        code="download-repository",
    )


def _require_distinct(found: list[RemoteFile], endpoint: str) -> None:
    """Raises DownloadError where one of the files would be written over another, or is a folder of one."""
    names = {file.path for file in found}
    parts = {file.path + PART for file in found}
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    if len(names) < len(found) or names & folders or names & parts:
        raise _wrong(endpoint, tr("files of one name"))


def _try(client: Client, source: Source, endpoint: str, kind: str, name: str) -> list[RemoteFile] | None:
    if source == "hf":
        entries = _get(client, f"{endpoint}/api/{kind}s/{name}/tree/main?recursive=true")
        if entries is None:
            return None
        root = f"{endpoint}/{'' if kind == 'model' else 'datasets/'}{name}/resolve/main"
        listed = [entry for entry in _list(entries, endpoint) if entry.get("type") == "file"]
        return [_from_hf(entry, root, endpoint) for entry in listed]
    url = (
        f"{endpoint}/api/v1/{kind}s/{name}/repo/{'files' if kind == 'model' else 'tree'}?Revision=master&Recursive=true"
    )
    answer = _get(client, url)
    if answer is None:
        return None
    if not isinstance(answer, dict):
        raise _wrong(endpoint, answer)
    if not answer.get("Success", True):
        return None
    root = f"{endpoint}/{kind}s/{name}/resolve/master"
    data = answer.get("Data")
    listed = [
        entry
        for entry in _list(data.get("Files") if isinstance(data, dict) else data, endpoint)
        if entry.get("Type") == "blob"
    ]
    return [_file(entry.get("Path"), entry.get("Size"), entry.get("Sha256"), root, endpoint) for entry in listed]


def _from_hf(entry: dict[str, Any], root: str, endpoint: str) -> RemoteFile:
    stored = entry.get("lfs") or {}
    if not isinstance(stored, dict):
        raise _wrong(endpoint, entry)
    return _file(entry.get("path"), stored.get("size", entry.get("size")), stored.get("oid"), root, endpoint)


def _list(entries: Any, endpoint: str) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _wrong(endpoint, entries)
    return entries


def _file(path: Any, size: Any, digest: Any, root: str, endpoint: str) -> RemoteFile:
    """Return a checked list entry: a plain name below the folder, a size, and a digest or None."""
    if problem := name_problem(path, nested=True):
        raise _wrong(endpoint, path, tr("which {problem}", problem=problem))
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise _wrong(endpoint, size, tr("as the size of {path}", path=path))
    if digest and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise _wrong(endpoint, digest, tr("as the sha256 of {path}", path=path))
    return RemoteFile(path, size, digest.lower() if digest else None, f"{root}/{quote(path)}")


def _wrong(endpoint: str, found: object, what: str = "") -> DownloadError:
    text = ascii(found)
    return DownloadError(
        tr(
            "{endpoint}: its list of files is not one: it names {text}{value}",
            endpoint=endpoint,
            text=text[:120],
            value="..." * (len(text) > 120),
        )
        + (f", {what}" if what else ""),
        hint=tr("do not use this mirror"),
        code="download-wrong",
    )


def _get(client: Client, url: str) -> Any:
    """Return the JSON at ``url``; None if it does not exist or access is denied."""
    try:
        return client.json(url)
    except (*BROKEN, ValueError) as error:
        raise DownloadError(
            f"{url}: {type(error).__name__}: {error}",
            hint=tr("no network? Set https_proxy, HF_ENDPOINT for a mirror, or use the other --source"),
            code="download-network",
        ) from error
