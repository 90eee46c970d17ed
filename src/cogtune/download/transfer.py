"""Download one file: resumed where it stopped, retried when the connection breaks, and checked before it is renamed."""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

from cogtune.download.http import BROKEN, Client
from cogtune.download.remote import PART, RemoteFile
from cogtune.errors import DownloadError
from cogtune.language import phrase, tr
from cogtune.system.file_errors import explained

ATTEMPTS = 8
_BLOCK = 1 << 20
_CONTINUES = phrase("then run the same command again: it continues")


def fetch(
    client: Client,
    file: RemoteFile,
    target: Path,
    advance: Callable[[int], None],
    *,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Download ``file`` to ``target``, resuming from ``target.part``.

    A broken connection is reopened, with growing pauses, as long as data arrives. ``advance`` is called with the bytes
    that are done.

    Raises:
        DownloadError: the hub stays silent, or what arrived has another size or digest.
        DiskFullError, RunError: it cannot be written.
    """
    part = target.with_name(target.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.is_file() else 0
    if done > file.size:  # not the beginning of this file
        part.unlink()
        done = 0
    advance(done)
    failures = 0
    while done < file.size or not part.is_file():
        before = done
        try:
            done = _append(client, file, part, done, advance)
            reason = tr("the connection ended early")
        except HTTPError as error:
            done = part.stat().st_size if part.is_file() else 0
            reason = f"HTTP {error.code} {error.reason}"
            # it would give the same answer again
            failures = failures if error.code >= 500 or error.code == 429 else ATTEMPTS
        except BROKEN as error:
            done = part.stat().st_size if part.is_file() else 0
            silent = isinstance(error, TimeoutError)
            reason = (
                tr("the line was silent for {timeout:g} s", timeout=client.timeout)
                if silent
                else f"{type(error).__name__}: {error}"
            )
        if done > file.size:
            break
        if done < file.size:
            failures = 0 if done > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    tr(
                        "{url}: {done:,} of {size:,} bytes, then nothing more: {reason}",
                        url=file.url,
                        done=done,
                        size=file.size,
                        reason=reason,
                    ),
                    hint=tr("run the same command again: it continues; or use the other --source"),
                    code="download-network",
                )
            pause(min(2.0**failures, 30.0))
    _check(file, part)
    os.replace(part, target)


def _append(client: Client, file: RemoteFile, part: Path, done: int, advance: Callable[[int], None]) -> int:
    """Request the rest and append it; returns the new length."""
    with client.open(file.url, done) as answer:
        if done and answer.status != http.client.PARTIAL_CONTENT:  # this server does not support ranges
            advance(-done)
            done = 0
        with _opened(part, "ab" if done else "wb") as write:
            # what is there: a whole block would be lost to a line gone silent; and no more than the list says, and one
            while done <= file.size and (block := answer.read1(min(_BLOCK, file.size - done + 1))):
                write(block)
                done += len(block)
                advance(len(block))
    return done


@contextmanager
def _opened(part: Path, mode: str) -> Iterator[Callable[[bytes], None]]:
    """Writes into ``part``. Errors of the disk are told apart from those of the connection, which is reopened.

    Raises:
        DiskFullError, RunError: the disk's.
    """
    disk = functools.partial(explained, part, kept=tr("what was fetched stays"), then=tr(_CONTINUES), late=True)
    with disk():
        stream = open(part, mode, buffering=0)  # noqa: SIM115

    def write(block: bytes) -> None:
        rest = memoryview(block)
        with disk():
            while rest:
                rest = rest[stream.write(rest) :]

    with stream:
        yield write


def _check(file: RemoteFile, part: Path) -> None:
    """Check size and digest (if the hub has one). A file that fails is removed, so that a rerun starts it again."""
    found = part.stat().st_size
    wrong = (
        tr("{found:,} bytes; the hub's list says {size:,}", found=found, size=file.size) if found != file.size else None
    )
    if wrong is None and file.sha256 is not None and digest(part) != file.sha256:
        wrong = tr("its sha256 is not the one in the hub's list")
    if wrong is not None:
        part.unlink()
        raise DownloadError(
            tr("{where}: {what}", where=file.path, what=wrong),
            hint=tr("it was removed; run the same command again, or use the other --source"),
            code="download-wrong",
        )


def digest(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
