"""Leases: which features running runs need. Other runs must not remove those files, nor use the disk space reserved for
them.

A lease is a file of lines:

    by {process}               its owner (`system.processes`)
    since VARIANT SECONDS      all features of a variant that were written or used after a time: those of a run that
                               is looking for them, or computing them
    reserve BYTES              disk space that a run still needs
    VARIANT/DIGEST             features that a run needs

A lease is valid while its process exists. If that cannot be checked, it is valid for a day, and its reservation and
``since`` lines for an hour; reading and computing features renew it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.features.ownership import CLAIM_SUFFIX, CLAIMS_FOLDER, is_claim
from cogtune.features.store import make_folder, write_atomically
from cogtune.system.files import is_running
from cogtune.system.processes import Process

_RENEW_SECONDS = 60.0
_VALID_SECONDS = 24 * 3600.0
_FILLING_SECONDS = 3600.0
_SLACK_SECONDS = 2.0  # resolution of file times


class Lease:
    """This process's claim. There is none in a cache that it may only read: a process without write access cannot
    evict, and those with it protect their own features."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / CLAIMS_FOLDER / f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}{CLAIM_SUFFIX}"
        self._owner = os.getpid()
        self._by = f"by {Process.here().text()}"
        self._since = ""
        self._renewed = 0.0

    def claim(self, files: Iterable[str]) -> None:
        """Claim exactly these feature files, given as ``variant/digest``."""
        self._write("".join(f"{name}\n" for name in files))

    def begin(self, variant: str) -> None:
        """Additionally claim all features of a variant written or used from now on, by the clock of the cache's
        disk."""
        self._write("")
        with suppress(OSError):
            self._since = f"since {variant} {self._path.stat().st_mtime - _SLACK_SECONDS}\n"
        self.reserve(0)

    @property
    def is_begun(self) -> bool:
        """Return whether `begin` was called."""
        return bool(self._since)

    def reserve(self, size: int) -> None:
        """Reserve disk space for ``size`` more bytes, after `begin`."""
        self._write(f"{self._since}reserve {size}\n")

    @property
    def is_due(self) -> bool:
        """Return whether the last claim or renewal was a while ago."""
        return time.monotonic() - self._renewed > _RENEW_SECONDS

    def renew(self) -> None:
        """Renew the lease; called at every read by any process of the run, touches the file at most once a minute."""
        if self.is_due:
            self._renewed = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)

    def remove(self) -> None:
        """Remove the lease at the end of the run; only the process that claimed it does."""
        if os.getpid() == self._owner:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def is_at(self, path: Path) -> bool:
        return path == self._path

    def _write(self, lines: str) -> None:
        self._renewed = time.monotonic()
        with suppress(OSError):
            make_folder(self._path.parent, self._root)
            write_atomically(self._path, (self._by + lines).encode("ascii", "replace"), self._root)


@dataclass
class Held:
    """Claims of running runs: features by name, features of a variant since a time, and bytes of disk space."""

    names: set[str] = field(default_factory=set)
    since: dict[str, float] = field(default_factory=dict)
    reserved: int = 0

    def holds(self, name: str, used: float) -> bool:
        """Return whether a run needs the features ``variant/digest``, written or last used at ``used``."""
        return name in self.names or used >= self.since.get(name.partition("/")[0], float("inf"))

    def add(self, line: str, *, filling: bool) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "by":
            return
        with suppress(ValueError):  # skip a damaged line; the others in its file are valid
            if kind == "since" and filling:
                variant, moment = rest.split()
                self.since[variant] = min(float(moment), self.since.get(variant, float("inf")))
            elif kind == "reserve" and filling:
                self.reserved += max(0, int(rest))
            elif "/" in kind:
                self.names.add(kind)


def leased(root: Path, own: Lease | None = None) -> Held:
    """Return what running runs hold, without ``own``. Expired leases are removed; files that are no leases are kept."""
    held = Held()
    for path in (root / CLAIMS_FOLDER).glob(f"*{CLAIM_SUFFIX}"):
        if (own is not None and own.is_at(path)) or not is_claim(path):
            continue
        with suppress(FileNotFoundError, PermissionError):
            age = time.time() - path.stat().st_mtime
            lines = path.read_text(encoding="ascii", errors="replace").splitlines()
            if not _is_valid(path.name, lines, age):
                path.unlink(missing_ok=True)
                continue
            for line in lines:
                held.add(line, filling=age < _FILLING_SECONDS)
    return held


def _is_valid(name: str, lines: list[str], age: float) -> bool:
    process = Process.parse(lines[0].removeprefix("by ")) if lines and lines[0].startswith("by ") else None
    if process is not None and process.is_visible:
        return process.is_running
    if process is None:  # written by an earlier version
        host, number = name.removesuffix(CLAIM_SUFFIX).rsplit(".", 2)[:2]
        if host == socket.gethostname() and not is_running(int(number)) and age > _RENEW_SECONDS:
            return False
    return age < _VALID_SECONDS
