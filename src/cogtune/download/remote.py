"""What a hub holds: every file of a repository with its size and digest, by the hubs' plain HTTP interfaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cogtune.download.http import BROKEN, Client
from cogtune.download.sources import Repository, Source
from cogtune.errors import DownloadError, InputError


@dataclass(frozen=True)
class RemoteFile:
    """``path`` inside the repository, size in bytes, sha256 where the hub gives it, and where to get it."""

    path: str
    size: int
    sha256: str | None
    url: str


def list_files(client: Client, source: Source, endpoint: str, repository: Repository) -> list[RemoteFile]:
    """The files of the first of the repository's names that the hub knows.

    Raises:
        DownloadError: the hub does not answer, or knows none of the names.
    """
    tried = []
    for name in repository.names(source):
        found = _try(client, source, endpoint, repository.kind, name)
        if found is not None:
            return [file for file in found if _inside(file.path, endpoint)]
        tried.append(name)
    raise InputError(
        f"{endpoint}: no repository {' or '.join(tried)} can be read there",
        hint="is it gated? Accept its licence on its page and set HF_TOKEN; or use the other --source",
        code="download-repository",
    )


def _inside(path: str, endpoint: str) -> bool:
    """Raises DownloadError for a path that would leave the folder."""
    if path.startswith("/") or ".." in path.split("/"):
        raise DownloadError(
            f"{endpoint}: its list names {path}, which lies outside the folder",
            hint="do not use this mirror",
            code="download-wrong",
        )
    return True


def _try(client: Client, source: Source, endpoint: str, kind: str, name: str) -> list[RemoteFile] | None:
    if source == "hf":
        url = f"{endpoint}/api/{kind}s/{name}/tree/main?recursive=true"
        entries: list[dict[str, Any]] | None = _get(client, url)
        if entries is None:
            return None
        root = f"{endpoint}/{'' if kind == 'model' else 'datasets/'}{name}/resolve/main"
        return [_from_hf(entry, root) for entry in entries if entry["type"] == "file"]
    url = (
        f"{endpoint}/api/v1/{kind}s/{name}/repo/{'files' if kind == 'model' else 'tree'}?Revision=master&Recursive=true"
    )
    answer: dict[str, Any] | None = _get(client, url)
    if answer is None or not answer.get("Success", True):
        return None
    root = f"{endpoint}/{kind}s/{name}/resolve/master"
    return [
        RemoteFile(entry["Path"], int(entry["Size"]), entry.get("Sha256") or None, f"{root}/{quote(entry['Path'])}")
        for entry in answer["Data"]["Files"]
        if entry["Type"] == "blob"
    ]


def _from_hf(entry: dict[str, Any], root: str) -> RemoteFile:
    stored = entry.get("lfs") or {}
    size = int(stored.get("size", entry["size"]))
    return RemoteFile(entry["path"], size, stored.get("oid"), f"{root}/{quote(entry['path'])}")


def _get(client: Client, url: str) -> Any:
    """The JSON at ``url``, or None if there is none for us."""
    try:
        return client.json(url)
    except (*BROKEN, ValueError) as error:
        raise DownloadError(
            f"{url}: {type(error).__name__}: {error}",
            hint="no network? Set https_proxy, HF_ENDPOINT for a mirror, or use the other --source",
            code="download-network",
        ) from error
